"""Bucket: the requests to an object store that are made here, each with its failures explained.

Credentials and endpoints come from the variables that each cloud's own tools read, through ``obstore``. Requests are
tried again where that may help: timeouts, throttling, 5xx, connections that break.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from batchinfer.errors import BatchInferError, JobError, StoreError
from batchinfer.location import redacted

CLIENT = {"connect_timeout": "10s", "timeout": "2m"}
RETRY = {
    "max_retries": 12,
    "retry_timeout": timedelta(minutes=4),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=30), "base": 2.0},
}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_ACCOUNT_KEY",
    "abfss": "AZURE_STORAGE_ACCOUNT_KEY",
}
MAY_PASS = (408, 409, 425, 429)  # of the statuses that blame the request


Condition = dict[str, str]  # what a request carries that is about one version of an object alone


@dataclass(frozen=True, slots=True)
class Version:
    """An object as it was at a moment."""

    key: str
    size: int
    modified: datetime
    tag: str  # differs between versions that differ
    condition: Condition


class Changed(Exception):
    """The object is not the version that the request was about."""


@functools.lru_cache(64)
def open_bucket(url: str) -> Bucket:
    """The bucket of a URL without a key. Nothing is asked of it yet.

    Raises: JobError if ``obstore`` is missing, or what is needed to reach it.
    """
    try:
        from obstore.store import from_url
    except ImportError:
        raise JobError(f'{url} needs the package obstore: pip install "batchinfer[cloud]"') from None
    plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    bucket = Bucket(url)
    with bucket.explained("open", ""):
        bucket.store = from_url(url, client_options={**CLIENT, "allow_http": plain}, retry_config=RETRY)
    return bucket


class Bucket:
    """Raises, in every method:

    FileNotFoundError: there is no such object.
    JobError: the bucket, the credentials or the name are wrong; trying again will not help.
    StoreError: the store did not answer as it should, for longer than it was tried again.

    Attributes:
        in_trouble: whether the last request ended in a StoreError.
    """

    store: Any

    def __init__(self, url: str) -> None:
        self.url, self.in_trouble = url, False

    def head(self, key: str) -> Version:
        import obstore

        with self.explained("look at", key):
            return _version(obstore.head(self.store, key))

    def get(self, key: str, span: tuple[int, int] | None = None, version: Version | None = None) -> bytes:
        """The object's bytes, or those from ``span[0]`` up to ``span[1]``. Raises: Changed."""
        import obstore

        options: dict[str, Any] = {} if span is None else {"range": span}
        if version is not None and "e_tag" in version.condition:
            options["if_match"] = version.condition["e_tag"]
        with self.explained("read", key):
            return obstore.get(self.store, key, options=options).bytes().to_bytes()

    def mark(self, key: str, name: str) -> str | None:
        """An attribute that the object was put with."""
        import obstore

        with self.explained("read", key):
            return obstore.get(self.store, key).attributes.get(name)

    def put(self, key: str, data: bytes, over: Condition | None = None, **marks: str) -> Condition:
        """Write an object, with ``marks`` as its attributes.

        Args:
            over: write it only over that version; ``{}`` is only where there is none. Raises: Changed.
        """
        import obstore

        mode: Any = "overwrite" if over is None else over or "create"
        with self.explained("write", key):
            told = obstore.put(
                self.store, key, memoryview(data).cast("B"), mode=mode, attributes=marks or None, use_multipart=False
            )
        return _condition(told)

    def copy(self, key: str, target: str) -> None:
        import obstore

        with self.explained("copy", key):
            obstore.copy(self.store, key, target)

    def delete(self, keys: Sequence[str]) -> None:
        """Those already gone are passed over."""
        import obstore

        with self.explained("remove", keys[0]), contextlib.suppress(FileNotFoundError):
            obstore.delete(self.store, list(keys))

    def list(self, folder: str) -> Iterator[Version]:
        """Every object at any depth below a folder, sorted."""
        import obstore

        with self.explained("list", folder):
            for some in obstore.list(self.store, folder or None, chunk_size=1000):
                yield from map(_version, some)

    def list_folder(self, folder: str) -> tuple[list[Version], list[str]]:
        """The objects right in a folder, and the folders in it, both with their whole keys."""
        import obstore

        with self.explained("list", folder):
            found = obstore.list_with_delimiter(self.store, folder or None)
            return [_version(meta) for meta in found["objects"]], list(found["common_prefixes"])

    def explained(self, doing: str, key: str) -> _Explained:
        return _Explained(doing, f"{self.url}/{key}".rstrip("/"), self)


def _version(meta: Any) -> Version:
    tag = meta["e_tag"] or meta["last_modified"].isoformat()
    return Version(meta["path"], meta["size"], meta["last_modified"], tag, _condition(meta))


def _condition(told: Any) -> Condition:
    return {name: told[name] for name in ("e_tag", "version") if told[name]}


class _Explained(contextlib.AbstractContextManager):
    """Turn what obstore raises into our own exceptions. Its words may hold a signed URL, so few of them are kept."""

    def __init__(self, doing: str, url: str, bucket: Bucket) -> None:
        self.doing, self.url, self.bucket = doing, url, bucket

    def __exit__(self, kind, error, traceback) -> None:
        self.bucket.in_trouble = False
        if error is None or isinstance(error, (BatchInferError, GeneratorExit, KeyboardInterrupt)):
            return
        from obstore import exceptions as told

        said = str(error)
        if "NoSuchBucket" in said or "ContainerNotFound" in said or "The specified bucket does not exist" in said:
            raise JobError(f"cannot {self.doing} {self.url}: there is no bucket {self.bucket.url}") from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(2, "No such object", self.url) from None
        if isinstance(error, (told.AlreadyExistsError, told.PreconditionError)):
            raise Changed(self.url) from None
        if isinstance(error, told.BaseError) or "Could not parse path" in said:
            raise self._about(error, said) from None

    def _about(self, error: BaseException, said: str) -> BatchInferError:
        from obstore import exceptions as told

        status = re.search(r"status code: (\d{3})", said)
        code = re.search(r"<Code>(\w+)</Code>", said)
        number = int(status[1]) if status else 0
        shown = " ".join(filter(None, [f"status {number}" if number else "", code[1] if code else ""]))
        shown = shown or redacted(said.splitlines()[0].rpartition(" - ")[2]).strip()
        begin = f"cannot {self.doing} {self.url}"
        variables = CREDENTIALS[self.url.partition("://")[0]]
        if "169.254.169.254" in said or "metadata.google" in said or "MissingAccount" in said:
            return JobError(f"{begin}: no credentials found; set {variables} in the environment")
        if isinstance(error, (told.PermissionDeniedError, told.UnauthenticatedError)) or number in (401, 403):
            return JobError(
                f"{begin}: access denied ({shown}); look at {variables}, and at the endpoint and region, in the "
                "environment"
            )
        wrong = (told.NotSupportedError, told.InvalidPathError, told.UnknownConfigurationKeyError, ValueError)
        if isinstance(error, wrong) or (300 <= number < 500 and number not in MAY_PASS):
            return JobError(f"{begin}: {shown}")
        self.bucket.in_trouble = True
        return StoreError(
            f"{begin}: {shown or 'no answer'}, however often it was tried. Nothing committed is lost: run the same "
            "command again once the store answers"
        )
