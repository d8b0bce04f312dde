"""Commits: the records that make rows exist. Put if absent, one file each, and none ever changes.

    commits/000007.json      unit 7, as the run committed it
    commits/000007.2.json    the same rows after they were superseded twice: the last version is the one that counts

A version is one more than the one it was made from, so that of two that supersede the same version only one is put.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from batchinfer.data.store import Store
from batchinfer.errors import IntegrityError

FOLDER = "commits"
_NAME = re.compile(r"(\d+)(?:\.(\d+))?\.json")


@dataclass(frozen=True, slots=True)
class Commit:
    """A finished unit: where its rows lie and what they are."""

    unit: int
    part: str  # relative to OUT; the same for all versions, so that a new one takes the place of the old
    rows: int
    bytes: int
    sha256: str
    file: str
    first_row: int
    failed: int
    finish_reasons: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    fingerprint: str
    epoch: int
    failures: dict[str, int] = field(default_factory=dict)  # kind → rows
    time: float = field(default_factory=time.time)
    version: int = 0
    retry: int = 0  # the number of the retry that made this version; 0: the run itself
    superseded: int = 0  # rows that this retry answered anew

    @property
    def name(self) -> str:
        return _name(self.unit, self.version)

    @property
    def staged(self) -> str:
        """Where the part waits until it is committed."""
        return staged(self.unit, self.epoch)

    def encode(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()


def staged(unit: int, epoch: int) -> str:
    return f"staged/{unit:06d}.{epoch}"


def names(store: Store) -> list[str]:
    """The records that count, in the order of the units. Raises: IntegrityError if there is a strange file."""
    versions: dict[int, int] = {}
    for name in store.list(FOLDER, ".json"):
        if (told := _NAME.fullmatch(name)) is None:
            raise IntegrityError(f"{store.path(f'{FOLDER}/{name}')} is no commit record of this version; remove it")
        unit, version = int(told[1]), int(told[2] or 0)
        versions[unit] = max(version, versions.get(unit, 0))
    return [_name(unit, versions[unit]) for unit in sorted(versions)]


def read(store: Store, records: Sequence[str]) -> dict[int, Commit]:
    """Unit → what some records say. Raises: IntegrityError if one is damaged."""
    found = (parse(store, name, record) for name, record in zip(records, store.read_all(records)))
    return {commit.unit: commit for commit in found}


def parse(store: Store, name: str, record: bytes) -> Commit:
    """Raises: IntegrityError if the record is damaged."""
    try:
        return Commit(**json.loads(record))
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"commit record {store.path(name)} is damaged: {error}") from None


def is_taken(store: Store, unit: int, version: int) -> bool:
    return store.size(_name(unit, version)) is not None


def _name(unit: int, version: int) -> str:
    return f"{FOLDER}/{unit:06d}.{version}.json" if version else f"{FOLDER}/{unit:06d}.json"
