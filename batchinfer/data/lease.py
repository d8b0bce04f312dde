"""Lease: a lock in an object store, where no kernel knows whether its holder still lives."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from datetime import datetime, timezone
from typing import Any

from batchinfer.data.bucket import Bucket, Condition, Version
from batchinfer.data.holder import holder, is_here, is_running, who
from batchinfer.errors import BatchInferError, LockedError

BEAT, STALE = 15.0, 90.0  # seconds between renewals, and without one after which the holder counts as dead
_held: set[str] = set()  # runs of this process that hold a lease; the store may have been in trouble when one ended


class Lease:
    """A lock object that its holder renews, by compare-and-swap. Whoever finds it stale takes it over in the same way.

    Ages are told by the store's clock, so that the machines' own need not agree. A holder that was frozen, or could not
    reach the store, for so long that another took over is told so by ``check``; what it still commits is committed
    once, as ever (see ledger.py).

    Raises: LockedError naming the holder.
    """

    def __init__(self, bucket: Bucket, key: str, output: Any) -> None:
        self._bucket, self._key, self._output = bucket, key, output
        self._holder = {**holder(), "run": uuid.uuid4().hex}
        self._beats = 0
        self._lost = ""
        _held.add(self._holder["run"])
        try:
            while (mine := bucket.swap(key, self._content(), _free(bucket, key, output))) is None:
                pass  # another was quicker, and will be named
        except BaseException:
            _held.discard(self._holder["run"])
            raise
        self._mine, self._renewed = mine, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="batchinfer-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if not self._lost and time.monotonic() - self._renewed > STALE:  # it was frozen a moment ago
            self._find()
        if self._lost:
            raise LockedError(f"{self._lost}; what this run committed stays")

    def release(self, leave_trace: bool = True) -> None:
        _held.discard(self._holder["run"])
        self._ended.set()
        self._thread.join(1.0)
        with contextlib.suppress(BatchInferError):  # then it ends by itself
            if not self._lost and not self._bucket.in_trouble and self._find():
                self._bucket.delete([self._key])

    @staticmethod
    def is_held(bucket: Bucket, key: str) -> bool:
        """By this machine's clock, as telling it by the store's takes a write."""
        try:
            found, content = bucket.head(key), bucket.get(key)
        except FileNotFoundError:
            return False
        return not _is_dead(content) and (datetime.now(timezone.utc) - found.modified).total_seconds() < STALE

    def _content(self) -> bytes:
        return json.dumps({**self._holder, "beat": self._beats}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            self._beats += 1
            with contextlib.suppress(BatchInferError):  # the store has trouble, which the run will meet by itself
                mine = self._bucket.swap(self._key, self._content(), self._mine) or self._find()
                if mine is None:
                    return
                self._mine, self._renewed = mine, time.monotonic()

    def _find(self) -> Condition | None:
        """The version of the lock if it is this run's still: the answer to a renewal may have got lost."""
        try:
            found, content = self._bucket.head(self._key), self._bucket.get(self._key)
        except FileNotFoundError:
            self._lost = f"the lock of this run, {self._bucket.url}/{self._key}, is gone"
            return None
        if json.loads(content).get("run") == self._holder["run"]:
            return found.condition
        self._lost = f"{self._output} was taken over by another run{who(content)}, as this one seemed dead"
        return None


def _free(bucket: Bucket, key: str, output: Any) -> Condition:
    """The version of the lock that may be taken over, ``{}`` if there is none. Raises: LockedError."""
    try:
        found, content = bucket.head(key), bucket.get(key)
    except FileNotFoundError:
        return {}
    if not _is_dead(content) and (left := STALE - _age(bucket, key, found)) > 0:
        raise LockedError(
            f"{output} is being written by another run{who(content)}. If that one died, its lease ends in {left:.0f} s"
        )
    return found.condition


def _age(bucket: Bucket, key: str, found: Version) -> float:
    """Seconds since it was written."""
    probe = f"{key}.{uuid.uuid4().hex}"
    bucket.put(probe, b"")
    try:
        return (bucket.head(probe).modified - found.modified).total_seconds()
    finally:
        with contextlib.suppress(BatchInferError):
            bucket.delete([probe])


def _is_dead(content: bytes) -> bool:
    """Whether the holder is known to be gone: a process of this machine, or a run of this process."""
    try:
        told = json.loads(content)
        return is_here(told) and told["run"] not in _held and not is_running(told["pid"])
    except (ValueError, KeyError, TypeError):
        return False
