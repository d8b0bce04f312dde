"""ObjectFile: an object to read at random, as pyarrow reads files."""

from __future__ import annotations

from batchinfer.data.bucket import Bucket, Changed, Version, open_bucket
from batchinfer.errors import DriftError
from batchinfer.location import Location

TAIL = 1 << 16  # bytes at the end, where a Parquet file's footer is, that are fetched at once and kept


def open_object(url: str) -> ObjectFile:
    """Raises: FileNotFoundError."""
    place = Location.parse(url)
    bucket = open_bucket(place.bucket)
    return ObjectFile(bucket, bucket.head(place.key))


class ObjectFile:
    """One version of an object; each read is a request for just these bytes.

    Raises, when it is read: DriftError if the object was changed or removed.
    """

    closed = False

    def __init__(self, bucket: Bucket, version: Version) -> None:
        self._bucket, self.version = bucket, version
        self._at = 0
        self._tail_begin = max(0, version.size - TAIL)
        self._tail: bytes | None = None

    def read(self, size: int | None = -1) -> bytes:
        end = self.version.size if size is None or size < 0 else min(self._at + size, self.version.size)
        begin, self._at = self._at, max(self._at, end)
        if begin >= end:
            return b""
        if begin < self._tail_begin:
            return self._get(begin, end)
        if self._tail is None:
            self._tail = self._get(self._tail_begin, self.version.size)
        return self._tail[begin - self._tail_begin : end - self._tail_begin]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.version.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        """Nothing is written."""

    def __enter__(self) -> ObjectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get(self, begin: int, end: int) -> bytes:
        url = f"{self._bucket.url}/{self.version.key}"
        try:
            return self._bucket.get(self.version.key, (begin, end), self.version)
        except Changed:
            raise DriftError(
                f"{url} changed while it was read; its rows would come from two versions of the file"
            ) from None
        except FileNotFoundError:
            raise DriftError(f"{url} went away while it was read") from None
