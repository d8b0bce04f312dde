"""Where parts and control files lie: the few operations that durability rests on, on a disk or elsewhere."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from batchinfer.data.lock import FileLock, Lock
from batchinfer.errors import OutputError, WriteError
from batchinfer.location import is_remote, local_path


class Store(Protocol):
    """A folder. Names are relative to ``root`` and use ``/``.

    What a method promises to be durable is so when it returns, the folder's entry included unless the method says
    otherwise. Every failure names the file and may pass, a WriteError on a disk and a StoreError elsewhere, unless the
    method says otherwise.
    """

    root: Any  # what people call it; its ``str`` leads back to it
    sync_gap: tuple[float, int]  # seconds and rows between two syncs of the journal, if the job does not say
    note_gap: float  # seconds between two notes, at least
    shared: bool  # whether runs on other machines may write here, lock or not

    def path(self, name: str) -> Any:
        """What people call a file."""

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""

    def read_all(self, names: Iterable[str]) -> Iterable[bytes]:
        """The files' bytes, in the order of the names. Raises: FileNotFoundError."""

    def open(self, name: str) -> Any:
        """A file to read at random, as pyarrow takes it. Raises: OSError, FileNotFoundError for one."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Names of the files right in ``folder``, sorted; empty if there is no such folder."""

    def walk(self) -> dict[str, int]:
        """Every file at any depth, and its bytes; sorted."""

    def make_folder(self, folder: str) -> None: ...

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file under a name nobody looks at yet. Its folder entry is durable after ``sync``."""

    def append(self, name: str, data: bytes) -> None:
        """Append to a file, made if it is missing (its folder entry is durable after ``sync``)."""

    def note(self, name: str, lines: bytes) -> None:
        """Append lines that are there for people: a power cut may take them, and what cannot be written is not."""

    def sync(self, folder: str) -> None:
        """Make the entries of a folder durable."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader sees the old bytes or the new ones, never a mixture."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a whole file unless the name is taken; exactly one of several writers gets True.

        A reader never sees part of it.
        """

    def move(self, name: str, to: Store, target: str) -> None:
        """Give a file its final name, in a store of the same kind; a reader never sees part of it."""

    def remove(self, names: Iterable[str], strict: bool = False) -> None:
        """Remove files; those already gone, or unless ``strict`` those that cannot go now, are passed over."""

    def claim(self, control: Store) -> None:
        """Make it the output of a job whose control files lie in ``control``.

        Raises: OutputError if it holds anything already, or cannot be one.
        """

    def lock(self, name: str, output: Any) -> Lock:
        """Take the lock of that name, which keeps other runs from ``output``. Raises: LockedError naming the holder."""

    def is_locked(self, name: str) -> bool:
        """Whether somebody holds it, as far as can be told without waiting."""


def open_store(folder: str | os.PathLike[str]) -> Store:
    """The store of a folder that a person named, by its path or its URL.

    Raises: JobError for a URL that cannot be one, or if what opens it is not installed.
    """
    folder = os.fspath(folder)
    if is_remote(folder):
        from batchinfer.data.object_store import ObjectStore

        return ObjectStore(folder)
    return LocalStore(local_path(folder))


class LocalStore:
    """A folder on a local or network file system; what is durable has been fsynced."""

    sync_gap = (1.0, 64)
    note_gap = 0.0
    shared = False

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, name: str) -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def read_all(self, names: Iterable[str]) -> Iterable[bytes]:
        return (self.read(name) for name in names)

    def open(self, name: str) -> pa.NativeFile:
        return pa.OSFile(os.fspath(self.path(name)))

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self.path(name)).st_size
        except FileNotFoundError:
            return None

    def list(self, folder: str, suffix: str = "") -> list[str]:
        try:
            with os.scandir(self.path(folder)) as entries:
                return sorted(e.name for e in entries if e.name.endswith(suffix) and e.is_file())
        except FileNotFoundError:
            return []

    def walk(self) -> dict[str, int]:
        paths = sorted(path for path in self.root.rglob("*") if not path.is_dir())
        return {path.relative_to(self.root).as_posix(): path.lstat().st_size for path in paths}

    def make_folder(self, folder: str) -> None:
        with _explained("make the folder", self.path(folder)):
            self.path(folder).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        self._write(name, data, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def append(self, name: str, data: bytes) -> None:
        self._write(name, data, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def note(self, name: str, lines: bytes) -> None:
        with contextlib.suppress(OSError), open(self.path(name), "ab", buffering=0) as file:
            file.write(lines)

    def sync(self, folder: str) -> None:
        with _explained("sync", self.path(folder)):
            fd = os.open(self.path(folder), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def replace(self, name: str, data: bytes) -> None:
        temporary = _temporary(name)
        self.write(temporary, data)
        self.move(temporary, self, name)
        self.sync(_folder(name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """The bytes are durable under another name before ``link(2)`` gives them this one."""
        temporary = _temporary(name)
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

    def move(self, name: str, to: Store, target: str) -> None:
        """In a folder of the same file system that is made if it is missing."""
        path: Path = to.path(target)
        with _explained("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path(name), path)

    def remove(self, names: Iterable[str], strict: bool = False) -> None:
        for name in names:
            try:
                os.unlink(self.path(name))
            except FileNotFoundError:
                pass
            except OSError as error:
                if strict:
                    raise OutputError(f"cannot remove {self.path(name)}: {error.strerror}") from None

    def claim(self, control: Store) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            entries = sorted(os.listdir(self.root))
            mounted = os.stat(self.root).st_dev != os.stat(control.root).st_dev
        except OSError as error:
            raise OutputError(f"cannot write to {self.root}: {error.strerror}") from None
        if entries:
            raise OutputError(
                f"{self.root} is not empty (it holds {entries[0]}) and no job was begun in it; choose another "
                "output.path or empty it"
            )
        if mounted:
            raise OutputError(
                f"{self.root} is a mount point, so its control folder {control.root} would lie on another file "
                f"system; choose a folder inside it, such as {self.root / 'completions'}"
            )

    def lock(self, name: str, output: Any) -> FileLock:
        return FileLock(self.path(name), output)

    def is_locked(self, name: str) -> bool:
        return FileLock.is_held(self.path(name))

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


def _temporary(name: str) -> str:
    """A name of this writer's own, also where hosts or containers that share the folder count processes alike."""
    return f"{name}.{secrets.token_hex(4)}.{os.getpid()}.tmp"


def _folder(name: str) -> str:
    return name.rpartition("/")[0] or "."


class _explained(contextlib.AbstractContextManager):
    """Turn an OSError into a line for a person."""

    def __init__(self, doing: str, path: Path) -> None:
        self.doing, self.path = doing, path

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, OSError):
            raise WriteError(
                f"cannot {self.doing} {self.path}: {error.strerror or error}. Nothing committed is lost: make room or "
                "mend the folder and run the same command again"
            ) from error
