"""Child: a batchinfer command as a process group of its own, for programs that keep another Python environment."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

POLL = 0.05
STRAGGLERS = 2.0  # seconds for which what the command started may outlive it


class Child:
    """Starts a command. It gets SIGTERM should this process die, so that nothing runs on that nobody waits for.

    Nothing here blocks on the process without looking now and then, so that ``stop`` may be called by a signal handler
    that interrupts any other method.

    Args:
        env: added to this process's environment.

    Raises: OSError if the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | os.PathLike[str] | None = None
    ) -> None:
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115  (read once it has ended)
        self._process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=_dies_with_parent(),
        )
        self.pid = self._process.pid
        threading.Thread(target=self._sweep, name="batchinfer-sweep", daemon=True).start()

    def lines(self) -> Iterator[str]:
        """What it says on stderr, line by line as it comes, to its end."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            yield line.rstrip("\n")

    def wait(self) -> int:
        """Its exit code once it has ended, below zero for a signal's number."""
        while self._process.poll() is None:
            time.sleep(POLL)
        return self._process.returncode

    def answer(self) -> dict[str, Any] | None:
        """The JSON object that it printed on stdout, once it has ended; None if it printed none."""
        self._stdout.seek(0)
        with contextlib.suppress(ValueError, IndexError):
            return json.loads(self._stdout.read().splitlines()[-1])
        return None

    def stop(self, patience: float) -> None:
        """Ask the group to end, and after ``patience`` seconds make it."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + patience
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
                return
            time.sleep(POLL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _sweep(self) -> None:
        """Processes that outlive the command would keep ``lines`` open, and a GPU's memory."""
        self.wait()
        time.sleep(STRAGGLERS)
        self._signal(signal.SIGKILL)


def _dies_with_parent() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # looked up before the fork, after which little is allowed
    return lambda: libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
