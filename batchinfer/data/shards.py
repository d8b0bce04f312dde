"""Shards at work: who may write an output at the same time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from batchinfer.data.holder import who
from batchinfer.data.store import Store
from batchinfer.errors import LockedError
from batchinfer.shard import Shard

WHOLE = "lock"
_LOCK = re.compile(r"lock\.(\d+)-of-(\d+)")


class Turn:
    """A run's turn at an output: alone, or as a shard beside others of the same count, each of them once.

    A run takes a lock of its own and then looks at those of the others: of two that begin at the same moment one at
    least sees the other.

    Raises: LockedError naming the holder.
    """

    def __init__(self, store: Store, output: Any, shard: Shard | None) -> None:
        name, what = (WHOLE, output) if shard is None else (_name(shard), f"shard {shard} of {output}")
        self._lock = store.lock(name, what)
        try:
            for other, whose in _others(store, shard):
                if store.is_locked(other):
                    more = "; shards that run together must count alike" if shard and other != WHOLE else ""
                    raise LockedError(f"{output} is being written by {whose}{_told(store, other)}{more}")
        except BaseException:
            self._lock.release(leave_trace=False)
            raise
        self.check, self.release = self._lock.check, self._lock.release


def running(store: Store) -> list[Shard]:
    """The shards that run."""
    return [shard for shard in _known(store) if store.is_locked(_name(shard))]


def _told(store: Store, name: str) -> str:
    """Who holds a lock, as far as it says."""
    try:
        return who(store.read(name))
    except FileNotFoundError:
        return ""


def _others(store: Store, shard: Shard | None) -> Iterator[tuple[str, str]]:
    """Locks that must be free for a run, and what to call who holds them."""
    if shard is not None:
        yield WHOLE, "another run"
    for other in _known(store):
        if shard is None or other.count != shard.count:
            yield _name(other), f"shard {other}"


def _known(store: Store) -> list[Shard]:
    found = filter(None, (_LOCK.fullmatch(name) for name in store.list(".")))
    return sorted(Shard(int(name[1]), int(name[2])) for name in found)


def _name(shard: Shard) -> str:
    return f"lock.{shard.index}-of-{shard.count}"
