"""Where parts and control files lie: the few operations that durability rests on.

An object store offers the same words (write under a fresh name, put if absent, list, read, remove), so one can stand
behind this interface later; ``append`` and ``move`` then stay with the local disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from batchinfer.errors import OutputError


class LocalStore:
    """A folder on a local or network file system. Names are relative to ``root`` and use ``/``.

    What a method promises to be durable has been fsynced when it returns, the folder entry included unless the method
    says otherwise. Every failure of the file system is an OutputError that names the file.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, name: str) -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""
        return self.path(name).read_bytes()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        try:
            return os.stat(self.path(name)).st_size
        except FileNotFoundError:
            return None

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Names of the files right in ``folder``, sorted; empty if there is no such folder."""
        try:
            with os.scandir(self.path(folder)) as entries:
                return sorted(e.name for e in entries if e.name.endswith(suffix) and e.is_file())
        except FileNotFoundError:
            return []

    def make_folder(self, folder: str) -> None:
        with _explained("make the folder", self.path(folder)):
            self.path(folder).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file under a name nobody looks at yet. Its folder entry is durable after ``sync``."""
        self._write(name, data, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def append(self, name: str, data: bytes) -> None:
        """Append to a file, made if it is missing (its folder entry is durable after ``sync``)."""
        self._write(name, data, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def sync(self, folder: str) -> None:
        """Make the entries of a folder durable."""
        with _explained("sync", self.path(folder)):
            fd = os.open(self.path(folder), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def replace(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader sees the old bytes or the new ones, never a mixture."""
        self.write(f"{name}.tmp", data)
        self.move(self.path(f"{name}.tmp"), self.path(name))
        self.sync(_folder(name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a whole file unless the name is taken; exactly one of several writers gets True.

        A reader never sees part of it: the bytes are durable under another name before ``link(2)`` gives them this one.
        """
        temporary = f"{name}.{os.getpid()}.tmp"
        self.write(temporary, data)
        with _explained("write", self.path(name)):
            try:
                os.link(self.path(temporary), self.path(name))
            except FileExistsError:
                return False
            finally:
                self.remove([temporary])
        self.sync(_folder(name))
        return True

    def move(self, source: Path, target: Path) -> None:
        """Give a file its final name, in a folder of the same file system that is made if it is missing."""
        with _explained("write", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those already gone, or that cannot go now, are left to the next clean-up."""
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(self.path(name))

    def _write(self, name: str, data: bytes, flags: int) -> None:
        path = self.path(name)
        with _explained("write", path):
            fd = os.open(path, flags, 0o666)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            finally:
                os.close(fd)


def _folder(name: str) -> str:
    return name.rpartition("/")[0] or "."


class _explained(contextlib.AbstractContextManager):
    """Turn an OSError into a line for a person."""

    def __init__(self, doing: str, path: Path) -> None:
        self.doing, self.path = doing, path

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot {self.doing} {self.path}: {error.strerror or error}. Nothing committed is lost: make room or "
                "mend the folder and run the same command again"
            ) from error
