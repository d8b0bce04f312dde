"""Leftovers: what runs that died left in a control folder, and nobody needs. Those that may live keep theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from batchinfer.data.commits import Commit
from batchinfer.data.holder import is_here, is_running
from batchinfer.data.journal import log_of
from batchinfer.data.store import Store
from batchinfer.shard import Shard


def leftovers(store: Store, commits: Mapping[int, Commit], retries: int, shard: Shard | None) -> Iterator[str]:
    """Names of files that a run may remove which holds the output, or a ``shard`` of it.

    Args:
        commits: unit → the version that counts.
        retries: how many were begun; one before the last is not taken up again.
    """
    leases = store.list("leases", ".json")
    alive = {name.split(".")[0].lstrip("0") for name in leases if lives(store, name, shard)}
    for name in store.list("staged"):
        if name.rpartition(".")[2] not in alive or _has_lost(name, commits):
            yield f"staged/{name}"
    for folder in (".", "commits", "leases") if shard is None else ():
        temporary = store.list(folder, ".tmp")
        yield from (f"{folder}/{name}" for name in temporary if not is_running(name.split(".")[-2]))
    for name in store.list("wal", ".arrows"):
        unit, retry = log_of(name)
        written = commits[unit].retry if unit in commits else -1
        if retry <= written or 0 < retry < retries:
            yield f"wal/{name}"


def lives(store: Store, lease: str, shard: Shard | None = None) -> bool:
    """Whether the run of a lease may be another one that goes on.

    To one that holds the whole output: whether it is a process of this machine, in case the lock does not work here, or
    in a shared store of another. To a shard: any run but those of that shard, on whatever machine.
    """
    try:
        told = json.loads(store.read(f"leases/{lease}"))
        if shard is not None and told.get("shard") != str(shard):
            return True
        return is_running(told["pid"]) if is_here(told) else store.shared
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return False


def _has_lost(name: str, commits: Mapping[int, Commit]) -> bool:
    """Whether the unit of a staged part was committed by a later run, so that this part never will be."""
    unit, _, epoch = name.partition(".")
    commit = commits.get(int(unit))
    return commit is not None and int(epoch) < commit.epoch
