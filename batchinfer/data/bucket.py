"""Bucket: the requests to an object store that are made here, tried again where that may help, failures explained.

Credentials and endpoints come from the variables that each cloud's own tools read, through ``obstore``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from batchinfer.errors import JobError, StoreError
from batchinfer.location import redacted

PATIENCE = 240.0  # seconds for which a request that fails in passing is tried again
FIRST_PATIENCE = 20.0  # until a bucket has answered once: its address may be wrong
PAUSES = (0.2, 30.0)  # seconds before the second try, and at most
CLIENT = {"connect_timeout": "10s", "timeout": "2m"}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_ACCOUNT_KEY",
    "abfss": "AZURE_STORAGE_ACCOUNT_KEY",
}
METADATA = ("169.254.169.254", "metadata.google")  # who is asked for credentials where there are none
VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")
MARK = "batchinferput"  # letters alone, as Azure wants it
MAY_PASS = (408, 409, 425, 429)  # of the statuses that blame the request
Condition = dict[str, str]  # what a request carries that is about one version of an object alone
T = TypeVar("T")
log = logging.getLogger(__name__)


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


def open_bucket(url: str) -> Bucket:
    """The bucket of a URL without a key, as the environment has it now. Nothing is asked of it yet.

    Raises: JobError if ``obstore`` is missing, or what is needed to reach it.
    """
    return _opened(url, frozenset(item for item in os.environ.items() if item[0].startswith(VARIABLES)))


@functools.lru_cache(64)
def _opened(url: str, environment: frozenset[tuple[str, str]]) -> Bucket:
    try:
        from obstore.store import from_url
    except ImportError:
        raise JobError(f'{url} needs the package obstore: pip install "batchinfer[cloud]"') from None
    plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    bucket, client = Bucket(url), {**CLIENT, "allow_http": plain}
    try:  # its own retries leave out conditional puts whose connection broke, and answers that broke in the middle
        bucket.store = from_url(url, client_options=client, retry_config={"max_retries": 0})
    except Exception as error:
        raise bucket.explained(error, f"cannot open {url}", url) from None
    return bucket


class Bucket:
    """Raises, in every method:

    FileNotFoundError: there is no such object.
    JobError: the bucket, the credentials or the name are wrong; trying again will not help.
    StoreError: the store did not answer as it should, for longer than PATIENCE.

    Attributes:
        in_trouble: whether the last request that ended did so in a StoreError.
        answered: whether one was answered.
    """

    store: Any

    def __init__(self, url: str) -> None:
        self.url, self.in_trouble, self.answered = url, False, False

    def head(self, key: str) -> Version:
        import obstore

        return _version(self.ask("look at", key, lambda: obstore.head(self.store, key)))

    def get(self, key: str, span: tuple[int, int] | None = None, version: Version | None = None) -> bytes:
        """The object's bytes, or those from ``span[0]`` up to ``span[1]``. Raises: Changed."""
        import obstore

        options: dict[str, Any] = {} if span is None else {"range": span}
        if version is not None and "e_tag" in version.condition:
            options["if_match"] = version.condition["e_tag"]
        return self.ask("read", key, lambda: obstore.get(self.store, key, options=options).bytes().to_bytes())

    def put(self, key: str, data: bytes, over: Condition | None = None, mark: str | None = None) -> Condition:
        """Write an object, with ``mark`` as an attribute of it.

        Args:
            over: write it only over that version; ``{}`` is only where there is none. Raises: Changed, also if this put
                itself was done before, and the answer to it was lost.
        """
        import obstore

        mode: Any = "overwrite" if over is None else over or "create"
        how = {"mode": mode, "attributes": {MARK: mark} if mark else None, "use_multipart": False}
        whole = memoryview(data).cast("B")
        return _condition(self.ask("write", key, lambda: obstore.put(self.store, key, whole, **how)))

    def swap(self, key: str, data: bytes, over: Condition) -> Condition | None:
        """Write an object over that version of it, ``{}`` being that there is none.

        The answer to such a put may get lost on its way and the put be tried again, which then finds its own work in
        its way: it carries a mark by which its writer knows it again.

        Returns: the version written; None if it was not that version any more.
        """
        mark = uuid.uuid4().hex
        try:
            return self.put(key, data, over, mark)
        except (Changed, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                if self._mark(key) == mark:
                    return self.head(key).condition
        return None

    def _mark(self, key: str) -> str | None:
        import obstore

        return self.ask("read", key, lambda: obstore.get(self.store, key).attributes).get(MARK)

    def copy(self, key: str, target: str) -> None:
        import obstore

        self.ask("copy", key, lambda: obstore.copy(self.store, key, target))

    def delete(self, keys: Sequence[str]) -> None:
        """Those already gone are passed over."""
        import obstore

        try:
            self.ask("remove", keys[0], lambda: obstore.delete(self.store, list(keys)))
        except FileNotFoundError:  # some stores mind, and have looked no further
            for key in keys if len(keys) > 1 else ():
                self.delete([key])

    def list(self, folder: str) -> list[Version]:
        """Every object at any depth below a folder, sorted by key."""
        import obstore

        found = self.ask("list", folder, lambda: [m for some in obstore.list(self.store, folder or None) for m in some])
        return sorted(_objects(found), key=lambda version: version.key)

    def list_folder(self, folder: str) -> tuple[list[Version], list[str]]:
        """The objects right in a folder, and the folders in it, both with their whole keys."""
        import obstore

        found = self.ask("list", folder, lambda: obstore.list_with_delimiter(self.store, folder or None))
        return list(_objects(found["objects"])), list(found["common_prefixes"])

    def ask(self, doing: str, key: str, request: Callable[[], T]) -> T:
        """Make a request until it is answered.

        Args:
            doing, key: what to say if it cannot be.
        """
        url = f"{self.url}/{key}".rstrip("/")
        begun, pause = time.monotonic(), PAUSES[0]
        while True:
            try:
                answer = _on_a_thread(request)
                self.in_trouble, self.answered = False, True
                return answer
            except Exception as error:
                told = self.explained(error, f"cannot {doing} {url}", url)
                if told is error:
                    raise
                if not isinstance(told, StoreError):
                    self.in_trouble = False
                    raise told from None  # obstore's own words may hold a signed URL
                patience = PATIENCE if self.answered else min(PATIENCE, FIRST_PATIENCE)
                if time.monotonic() + pause > begun + patience:
                    self.in_trouble = True
                    hint = "" if self.answered else ", if the endpoint that the environment names is the right one"
                    raise StoreError(
                        f"{told}, however often it was tried. Nothing committed is lost: run the same command again "
                        f"once the store answers{hint}"
                    ) from None
                log.debug("%s; trying again", told)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, PAUSES[1])

    def explained(self, error: Exception, begin: str, url: str) -> Exception:
        """What an exception of obstore's means here; itself if it is none."""
        from obstore import exceptions as known

        said = str(error)
        if "NoSuchBucket" in said or "ContainerNotFound" in said or "The specified bucket does not exist" in said:
            return JobError(f"{begin}: there is no bucket {self.url}")
        if isinstance(error, FileNotFoundError):
            self.answered = True
            return FileNotFoundError(2, "No such object", url)
        if isinstance(error, (known.AlreadyExistsError, known.PreconditionError)):
            self.answered = True
            return Changed(url)
        if not isinstance(error, known.BaseError) and "Could not parse path" not in said:
            return error
        status, code = re.search(r"status code: (\d{3})", said), re.search(r"<Code>(\w+)</Code>", said)
        number = int(status[1]) if status else 0
        shown = " ".join(filter(None, [f"status {number}" if number else "", code[1] if code else ""]))
        shown = shown or _broken(said) or redacted(said.splitlines()[0].rpartition(" - ")[2])
        variables = CREDENTIALS[self.url.partition("://")[0]]
        if "MissingAccount" in said or (not self.answered and any(host in said for host in METADATA)):
            return JobError(f"{begin}: no credentials found; set {variables} in the environment")
        if isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError)) or number in (401, 403):
            return JobError(
                f"{begin}: access denied ({shown}); look at {variables}, the endpoint and the region in the environment"
            )
        wrong = (known.NotSupportedError, known.InvalidPathError, known.UnknownConfigurationKeyError, ValueError)
        if isinstance(error, wrong) or number == 501 or (300 <= number < 500 and number not in MAY_PASS):
            return JobError(f"{begin}: {shown}")
        return StoreError(f"{begin}: {shown}")


def _on_a_thread(request: Callable[[], T]) -> T:
    """Make a request on a thread of its own if this is the main one, which could not act on a signal until it ends."""
    if threading.current_thread() is not threading.main_thread():
        return request()
    answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((request(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=work, name="batchinfer-request", daemon=True).start()
    answer, error = answers.get()
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def _broken(said: str) -> str:
    """How a connection failed, out of the depths of what obstore says."""
    kind = re.search(r"HttpError \{\s*kind: (\w+)", said)
    if kind is None:
        return ""
    why = re.search(r'(?:message|error): "([^"]+)"', said)
    told = {"Timeout": "no answer in time", "Connect": "no connection"}.get(kind[1], "the connection broke")
    return f"{told} ({why[1]})" if why else told


def _objects(found: Iterable[Any]) -> Iterator[Version]:
    """Consoles make empty objects that stand for folders, and nothing else says that those are none."""
    versions = map(_version, found)
    return (version for version in versions if version.size or "." in version.key.rpartition("/")[2])


def _version(meta: Any) -> Version:
    tag = meta["e_tag"] or meta["last_modified"].isoformat()
    return Version(meta["path"], meta["size"], meta["last_modified"], tag, _condition(meta))


def _condition(told: Any) -> Condition:
    return {name: told[name] for name in ("e_tag", "version") if told[name]}
