"""Object stores behind the interface of store.py: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

- A put is whole or not at all, and durable when it is answered; there is nothing to sync.
- Put-if-absent is a conditional put (If-None-Match).
- Appending to NAME puts numbered objects NAME/00000000, NAME/00000001, …, which are read as one file.
- Moving copies within the bucket, in one request, and then removes the source: who finds the source may do it again.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchinfer.data.bucket import open_bucket
from batchinfer.data.lease import Lease
from batchinfer.data.object_file import ObjectFile
from batchinfer.errors import BatchInferError, OutputError
from batchinfer.location import Location

AT_ONCE = 16  # requests, where many objects are wanted
APPENDED = (".arrows", ".jsonl")  # files of these kinds are appended to


class ObjectStore:
    """A folder of a bucket. Store trouble that lasts is a StoreError, a wrong bucket or credentials a JobError."""

    sync_gap = (10.0, 4096)
    note_gap = 30.0
    shared = True

    def __init__(self, root: str) -> None:
        place = Location.parse(root)
        if not place.key:
            raise OutputError(
                f"{place} is a whole bucket; choose a folder inside it, such as {place.bucket}/completions"
            )
        self.root = str(place)
        self.bucket, self._folder = open_bucket(place.bucket), place.key
        self._appended: dict[str, int] = {}  # objects of files that this process appends to

    def path(self, name: str) -> str:
        return f"{self.bucket.url}/{self._key(name)}"

    def read(self, name: str) -> bytes:
        if name.endswith(APPENDED):
            return b"".join(self._many(self.bucket.get, self._segments(name)))
        return self.bucket.get(self._key(name))

    def read_all(self, names: Iterable[str]) -> Iterable[bytes]:
        return self._many(self.read, names)

    def open(self, name: str) -> ObjectFile:
        return ObjectFile(self.bucket, self.bucket.head(self._key(name)))

    def size(self, name: str) -> int | None:
        if name.endswith(APPENDED):
            return sum(version.size for version in self.bucket.list(self._key(name))) or None
        try:
            return self.bucket.head(self._key(name)).size
        except FileNotFoundError:
            return None

    def list(self, folder: str, suffix: str = "") -> list[str]:
        objects, folders = self.bucket.list_folder(self._key(folder))
        keys = [*(version.key for version in objects), *(key for key in folders if key.endswith(APPENDED))]
        return sorted(key.rpartition("/")[2] for key in keys if key.endswith(suffix))

    def walk(self) -> dict[str, int]:
        return {v.key.removeprefix(f"{self._folder}/"): v.size for v in self.bucket.list(self._folder)}

    def make_folder(self, folder: str) -> None:
        """There are none."""

    def write(self, name: str, data: bytes) -> None:
        self.bucket.put(self._key(name), data)

    def append(self, name: str, data: bytes) -> None:
        number = self._appended.setdefault(name, 0)
        while not self.put_if_absent(f"{name}/{number:08d}", data):  # begun by an earlier process
            number += 1
        self._appended[name] = number + 1

    def note(self, name: str, lines: bytes) -> None:
        with contextlib.suppress(BatchInferError):
            if not self.bucket.in_trouble:
                self.append(name, lines)

    def sync(self, folder: str) -> None:
        """What was put is durable."""

    def replace(self, name: str, data: bytes) -> None:
        self.bucket.put(self._key(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return self.bucket.swap(self._key(name), data, {}) is not None

    def move(self, name: str, to: Any, target: str) -> None:
        try:
            self.bucket.copy(self._key(name), to._key(target))
        except FileNotFoundError:
            raise OutputError(f"cannot move {self.path(name)}: it is gone") from None
        self.remove([name])

    def remove(self, names: Iterable[str], strict: bool = False) -> None:
        if self.bucket.in_trouble and not strict:
            return  # another clean-up will come
        try:
            keys = [key for name in names for key in self._objects(name)]
            if keys:
                self.bucket.delete(keys)
        except BatchInferError:
            if strict:
                raise

    def claim(self, control: Any) -> None:
        if names := list(self.walk()):
            raise OutputError(
                f"{self.root} is not empty (it holds {names[0]}) and no job was begun in it; choose another "
                "output.path or empty it"
            )
        probe = f"probe.{uuid.uuid4().hex}"
        once, twice = control.put_if_absent(probe, b""), control.put_if_absent(probe, b"")
        control.remove([probe])
        if not once or twice:
            raise OutputError(
                f"{self.bucket.url} does not honour If-None-Match on a put, so that two runs could write a row twice; "
                "expected a store with conditional writes, as S3, Google and Azure are"
            )

    def lock(self, name: str, output: Any) -> Lease:
        return Lease(self.bucket, self._key(name), output)

    def is_locked(self, name: str) -> bool:
        return Lease.is_held(self.bucket, self._key(name))

    def _key(self, name: str) -> str:
        return self._folder if name == "." else f"{self._folder}/{name}"

    def _objects(self, name: str) -> list[str]:
        return self._segments(name) if name.endswith(APPENDED) else [self._key(name)]

    def _segments(self, name: str) -> list[str]:
        """Keys of the objects that make up an appended file, in their order."""
        return [version.key for version in self.bucket.list(self._key(name))]

    @staticmethod
    def _many(get: Any, names: Iterable[str]) -> Iterable[bytes]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(get, names)
