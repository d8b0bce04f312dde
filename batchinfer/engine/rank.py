"""Rank: the process of one, and the link to it. Started here, or by somebody else on this machine or another."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta

from torch.distributed import TCPStore

from batchinfer import errors
from batchinfer.engine.layout import World
from batchinfer.engine.link import DEADLINE, Link, Message
from batchinfer.engine.worker import ARENA_FD, ENGINE_KEY, LINK_FD
from batchinfer.errors import EngineError
from batchinfer.python_path import python_path


class Rank:
    """One rank's process and the link to it."""

    def __init__(self, number: int, name: str, process: subprocess.Popen | None, link: Link) -> None:
        self.number = number
        self.name = name
        self.process = process
        self.link = link

    @classmethod
    def start(cls, number: int, name: str, arena: int | None) -> Rank:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ) | {LINK_FD: str(theirs.fileno()), "PYTHONPATH": python_path()}
        if arena is not None:
            environment[ARENA_FD] = str(arena)
        process = subprocess.Popen(
            [sys.executable, "-m", "batchinfer.engine.worker"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()] + ([arena] if arena is not None else []),
            env=environment,
        )
        theirs.close()
        return cls(number, name, process, Link(ours))

    @classmethod
    def await_all(cls, world: World, store: TCPStore) -> list[Rank]:
        """Those that are started elsewhere, by somebody else: tell them where this engine is, and wait for them."""
        with socket.create_server(("", 0)) as server:
            server.settimeout(DEADLINE)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((store.host, store.port))
                store.set(ENGINE_KEY, f"{probe.getsockname()[0]}:{server.getsockname()[1]}")
            found: dict[int, Rank] = {}
            while len(found) < world.size:
                try:
                    channel, _ = server.accept()
                    channel.settimeout(DEADLINE)
                    link = Link(channel)
                    number = link.receive().fields["rank"]
                    channel.settimeout(None)
                except (TimeoutError, EOFError):
                    raise EngineError(
                        f"{len(found)} of {world.size} ranks have come within {DEADLINE:g} s: start each with "
                        "`python -m batchinfer.engine.worker`, or all of a machine with torchrun"
                    ) from None
                found[number] = cls(number, world.layout(number).name(number), None, link)
        return [found[number] for number in range(world.size)]

    def __str__(self) -> str:
        return self.name

    def _epitaph(self) -> str:
        """How its process ended."""
        if self.process is None:
            return "its link broke"
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its link broke or stands still"
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def died(self) -> EngineError:
        return EngineError(f"{self} of the engine ended: {self._epitaph()}; run again to go on")

    def failed(self, message: Message) -> Exception:
        """What it could not go on for, as the exception that it was."""
        told = message.fields
        if told["expected"]:
            return getattr(errors, told["error"], EngineError)(told["message"])
        return EngineError(f"{self} of the engine failed: {told['error']}: {told['message']}")

    def end(self) -> None:
        self.link.close()  # one that is elsewhere ends with it
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds on to: it is dead, or nearly
                self.process.wait(timeout=30)


def elsewhere() -> bool:
    """Whether ranks are started by somebody else, who has set what torchrun sets, but for this process's own rank."""
    return {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and "RANK" not in os.environ


def connect_store() -> TCPStore:
    """The store that rank 0 or torchrun serves at MASTER_ADDR and MASTER_PORT."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=DEADLINE))
    except RuntimeError:
        raise EngineError(f"no rank 0 at MASTER_ADDR {address}, MASTER_PORT {port}: start the ranks first") from None
