"""RankActor: keeps one rank of an engine whose ranks spread over several nodes of a Ray cluster."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import ray

from batchinfer.python_path import python_path

PAUSE = 0.5  # seconds before a rank that ended is started anew
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


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
    """Keeps a rank's process, which ends with the engine that it worked for: the next waits for one that comes back."""

    def serve(self, rank: int, meeting: Meeting) -> None:
        """Until the actor is killed."""
        one_gpu = {"LOCAL_RANK": "0"}  # Ray shows it no other
        told = {**meeting.environment, **one_gpu, "RANK": str(rank), "PYTHONPATH": python_path()}
        environment = {**os.environ, **told}
        command = [sys.executable, "-m", "batchinfer.engine.worker"]
        while True:
            subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, preexec_fn=_end_with_the_actor)
            time.sleep(PAUSE)


def _end_with_the_actor() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
