"""RankActor: one rank of an engine whose ranks spread over several nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of an engine find each other and it: rank 0 listens there. As torchrun has it."""

    address: str
    port: int

    @classmethod
    def here(cls) -> Meeting:
        """On this node, at a port that is free now."""
        with socket.create_server(("", 0)) as probe:
            return cls(ray.util.get_node_ip_address(), probe.getsockname()[1])

    @property
    def environment(self) -> dict[str, str]:
        return {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}


class RankActor:
    """Is the rank: its process ends with the engine that it worked for. Ray starts it anew, for one that comes back."""

    def serve(self, rank: int, meeting: Meeting) -> None:
        from batchinfer.engine.worker import main

        local = {"LOCAL_RANK": "0"}  # Ray shows it one GPU
        os.environ.update(meeting.environment | {"RANK": str(rank)} | local)
        with contextlib.suppress(Exception):  # told to the engine, if that is there; else there is nobody to tell
            main()
        os._exit(1)
