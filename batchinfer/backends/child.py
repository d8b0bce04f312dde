"""Child: the process of an engine as the run sees it. It is started, spoken to, waited for and, at last, killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from array import array

from batchinfer import deadline
from batchinfer.backends.base import Isolation
from batchinfer.backends.wire import Message, Wire, unpack_error
from batchinfer.job import Job
from batchinfer.python_path import python_path

TICK = 0.5  # seconds: silence is counted in these, so that a run which was stopped itself blames nobody
OPENING = 6  # times limits.engine_timeout: opening a model shows less of what it does
CLOSING = 5.0  # seconds for an engine to leave by itself
DYING = 5.0  # seconds for a process to end once its socket has


class Died(Exception):
    """The process ended, or was killed as it gave no sign of life. Says how, for people."""

    def __init__(self, how: str, hung: bool = False) -> None:
        super().__init__(how)
        self.hung = hung


class Child:
    """An exec'd worker in a session of its own: no signal of the terminal reaches it, and all it starts ends with it.

    Whatever becomes of it is told by ``hear``, after all that it had sent.
    """

    def __init__(self, job: Job, progress: bool, opener: str, isolation: Isolation) -> None:
        self._timeout = job.limits.engine_timeout
        self._patience = deadline.seconds(self._timeout)
        self._how = ""  # it died, where that is known already
        self._hung = False
        ours, theirs = socket.socketpair()
        ends_with_us, lifeline = os.pipe()
        self._lifeline = open(lifeline, "wb")  # noqa: SIM115  closed by kill(), or by the kernel when we are killed
        with theirs, open(ends_with_us, "rb"):
            ends = [theirs.fileno(), ends_with_us]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "batchinfer.backends.worker", *map(str, ends)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is the run's
                pass_fds=ends,
                start_new_session=True,
                env=_environ(isolation),
            )
        self._wire = Wire(ours, self._patience)
        self.say({"opener": opener, "job": job.model_dump(mode="json"), "progress": progress})

    def opened(self) -> Message:
        """What it opened, once it has. Raises: Died, and what the opener raised."""
        while True:
            message, _ = self.hear(OPENING * self._patience)
            if "error" in message:
                raise unpack_error(message)
            if "opened" in message:
                return message["opened"]

    def say(self, message: Message, ids: array[int] | None = None) -> None:
        try:
            self._wire.send(message, ids)
        except TimeoutError:
            self._hang(self._patience)
        except OSError:
            """It is dead, which hear() tells."""

    def hear(self, patience: float = 0.0) -> tuple[Message, array[int]]:
        """Its next message. Raises: Died, also if it is silent for ``patience`` seconds, or limits.engine_timeout."""
        silent, patience = 0.0, patience or self._patience
        while True:
            try:
                heard = self._wire.receive(TICK)
            except EOFError:
                self._bury()
                raise Died(self._how, self._hung) from None
            if heard is not None:
                return heard
            silent += TICK
            if silent >= patience:
                self._hang(patience)

    def close(self) -> None:
        """Have it leave; what it still says is not heard."""
        self.say({"close": True})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSING)
        self.kill()

    def kill(self) -> None:
        """End it and all it started, now."""
        self._kill_group()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DYING)
        self._wire.close()
        self._lifeline.close()

    def _hang(self, patience: float) -> None:
        times = f"{OPENING} times " if patience > self._patience else ""
        self._how = f"no sign of life for {times}{self._timeout} (limits.engine_timeout)"
        self._hung = True
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _bury(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DYING)
        self.kill()
        self._how = self._how or _how(self._process.returncode)


def _how(code: int | None) -> str:
    if code is None:
        return "it does not end, though it was killed"
    if code >= 0:
        return f"it exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = ", probably out of memory" if -code == signal.SIGKILL else ""
    return f"signal {-code} ({name}){hint}"


def _environ(isolation: Isolation) -> dict[str, str]:
    """This process's environment as the engine should see it."""
    seen = {name: value for name, value in os.environ.items() if not name.startswith(isolation.scrub)}
    return {**seen, **isolation.environ, "PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1"}
