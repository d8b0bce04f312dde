"""Location: where a path or a URL points, on a disk or in a bucket."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

from batchinfer.errors import JobError

SCHEMES = ("s3", "gs", "abfs", "abfss", "az")


def is_remote(path: str) -> bool:
    """Whether it names something in an object store, or at least not on a disk."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """The absolute path of something on a disk. Raises: JobError for a file:// URL of another machine."""
    if path.startswith("file://"):
        host, slash, rest = path.removeprefix("file://").partition("/")
        if host not in ("", "localhost") or not slash:
            raise JobError(f"{path}: expected file:///absolute/path, found a path on {host or 'no machine'}")
        path = "/" + unquote(rest)
    return os.path.abspath(os.path.expanduser(path))


def checked(path: str) -> str:
    """The path as it is. Raises: ValueError for a URL that holds a password or is of no kind that can be opened."""
    try:
        if is_remote(path):
            Location.parse(path)
    except JobError as error:
        raise ValueError(str(error)) from None
    return path


@dataclass(frozen=True, slots=True)
class Location:
    """Something in a bucket (Azure calls it a container)."""

    bucket: str  # a URL of it alone: s3://name, abfs://container@account.dfs.core.windows.net
    key: str  # without slashes at its ends; "" is the bucket itself

    @classmethod
    def parse(cls, url: str) -> Location:
        """Raises: JobError, whose message shows no password."""
        scheme, _, rest = url.partition("://")
        name, _, key = rest.partition("/")
        if ":" in name.rpartition("@")[0]:
            raise JobError(
                f"{redacted(url)} holds a password, which would be written into control files; credentials belong into "
                "the environment, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for instance"
            )
        scheme = "s3" if scheme == "s3a" else scheme
        if scheme not in SCHEMES:
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise JobError(f"{url}: expected a path, file:// or one of {known}, found {scheme}://")
        if not name:
            raise JobError(f"{url} names no bucket; expected {scheme}://bucket/…")
        return cls(f"{scheme}://{name}", key.strip("/"))

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}" if self.key else self.bucket


def redacted(text: str) -> str:
    """The text without user:password@ and without the queries of its URLs, which may be signed."""
    text = re.sub(r"(\w+://)[^/\s@]*:[^/\s@]*@", r"\1***@", text)
    return re.sub(r"(\w+://[^\s?\"'<>)]*)\?[^\s\"'<>)]*", r"\1", text)
