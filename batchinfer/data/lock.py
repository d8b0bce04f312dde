"""Lock: one run at a time on an output."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Protocol, TextIO

from batchinfer.data.holder import holder, who
from batchinfer.errors import LockedError, OutputError
from batchinfer.flock import held_by_another

GLANCE = (0.02, 0.02, 0.0)  # seconds to wait, in case it is held by one who only looks whether it is held


class Lock(Protocol):
    """Held from the moment it is made to its ``release``, or until the process dies.

    Only saves work: two runs that both believe they hold it still commit every row once (see ledger.py).
    """

    def check(self) -> None:
        """Raises: LockedError if it was lost to another run."""

    def release(self, leave_trace: bool = True) -> None:
        """Give it up. Without a trace: it was never made, nor its folder if that is empty."""


class FileLock:
    """An flock on a file, which says who holds it. It ends with the process, however that dies.

    Raises: LockedError naming the holder.
    """

    def __init__(self, path: Path, output: Path) -> None:
        self._path = path
        self._stream = self._take(output)
        while not self._is_current():  # its last holder removed it while we took it: there is a new one, or none
            self._stream.close()
            self._stream = self._take(output)
        self._stream.truncate(0)
        json.dump(holder(), self._stream)
        self._stream.flush()

    def check(self) -> None:
        """The kernel lets nobody else have it."""

    def release(self, leave_trace: bool = True) -> None:
        if not leave_trace:
            with contextlib.suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()
        self._stream.close()

    @staticmethod
    def is_held(path: Path) -> bool:
        with contextlib.suppress(OSError), open(path) as stream:
            return held_by_another(stream, shared=True)
        return False

    def _take(self, output: Path) -> TextIO:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            stream = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115  (held until it is released)
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror}") from None
        for seconds in GLANCE:
            if not held_by_another(stream):
                return stream  # or its file system knows no locks: the commits' put-if-absent has to do
            time.sleep(seconds)
        with stream:
            stream.seek(0)
            raise LockedError(f"{output} is being written by another run{who(stream.read())}")

    def _is_current(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self._path).st_ino == os.fstat(self._stream.fileno()).st_ino
        return False
