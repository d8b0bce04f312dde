"""Retries: rows of an output that are to be answered again, and with what settings. Chosen once, then frozen.

``retries/001.parquet`` in the control folder is written before any work: the rows of each unit, and in its metadata why
they were chosen and what answers them. A retry that was interrupted goes on from it, whatever its rows are by then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.cache import digest
from batchinfer.data.files import one_line
from batchinfer.data.filter import RowFilter
from batchinfer.data.partitions import partition_fields, partition_value
from batchinfer.data.store import Store
from batchinfer.errors import IntegrityError

if TYPE_CHECKING:
    from batchinfer.data.commits import Commit
    from batchinfer.data.ledger import Ledger

FOLDER = "retries"
LOOK_ROWS = 1 << 16  # of a part, looked at at a time
Rows = Mapping[int, np.ndarray]  # unit → which of its rows, ascending


@dataclass(frozen=True)
class Retry:
    """One retry. ``settings``: dotted key → value, where they differ from the job's."""

    number: int  # from 1
    where: str
    settings: dict[str, Any]
    semantic: dict[str, Any]  # what decides the new completions
    rows: Rows = field(repr=False)
    time: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.number:03d}.parquet"

    @property
    def count(self) -> int:
        return sum(map(len, self.rows.values()))

    def pending(self, commits: Mapping[int, Commit]) -> list[int]:
        """Units whose chosen rows have not been superseded by it."""
        return [unit for unit in self.rows if commits[unit].retry < self.number]

    def told(self) -> dict[str, Any]:
        """For job.json, the manifest and the footers of parts."""
        return {
            "retry": self.number,
            "where": self.where,
            "set": self.settings,
            "fingerprint": digest(self.semantic),
            "time": round(self.time, 3),
        }

    def encode(self) -> bytes:
        about = {"where": self.where, "set": self.settings, "semantic": self.semantic, "time": self.time}
        table = pa.table(
            {
                "unit": pa.array(self.rows, pa.int64()),
                "rows": pa.array(self.rows.values(), pa.list_(pa.uint32())),
            },
            metadata={"batchinfer.retry": json.dumps(about)},
        )
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue().to_pybytes()


def read_all(store: Store) -> list[Retry]:
    """All retries of an output, the first one first. Raises: IntegrityError if one is damaged or missing."""
    retries = []
    for number, name in enumerate(store.list(FOLDER, ".parquet"), 1):
        try:
            table = pq.read_table(pa.BufferReader(store.read(f"{FOLDER}/{name}")))
            about = json.loads(table.schema.metadata[b"batchinfer.retry"])
            rows = {unit.as_py(): own.values.to_numpy() for unit, own in zip(table["unit"], table["rows"])}
            retries.append(Retry(number, about["where"], about["set"], about["semantic"], rows, about["time"]))
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise IntegrityError(f"{store.path(f'{FOLDER}/{name}')} is damaged: {error}") from None
        if f"{FOLDER}/{name}" != retries[-1].name:
            raise IntegrityError(f"{store.path(retries[-1].name)} is missing, and a later retry stands")
    return retries


def outcome(ledger: Ledger, retry: Retry) -> dict[str, Any]:
    """What a retry was and what has become of its rows: superseded by it, or kept as they were since they failed again.

    Those of units that a later retry superseded too are not told apart any more.
    """
    made = [commit for commit in ledger.commits.values() if commit.retry == retry.number]
    superseded = sum(commit.superseded for commit in made)
    kept = sum(len(retry.rows[commit.unit]) for commit in made) - superseded
    return {**retry.told(), "rows": retry.count, "superseded": superseded, "kept": kept}


def choose(ledger: Ledger, where: str) -> Rows:
    """The committed rows for which a condition over one row of the output is true.

    Raises: JobError if it is no such condition, InputError if a column is missing or a value does not fit.
    """
    commits = [ledger.commits[unit] for unit in sorted(ledger.commits)]
    if not commits:
        return {}
    try:
        own = pq.read_schema(ledger.parts.open(commits[0].part))
    except (OSError, pa.ArrowException) as error:
        raise _damaged(ledger.parts.path(commits[0].part), error) from None
    told = [f for f in partition_fields(commit.part for commit in commits) if f.name not in own.names]
    condition = RowFilter(where, pa.schema([*own, *told]), "--where", "the output")
    chosen = {commit.unit: _of_part(ledger, commit, condition, told) for commit in commits if commit.rows}
    return {unit: rows for unit, rows in chosen.items() if len(rows)}


def _of_part(ledger: Ledger, commit: Commit, condition: RowFilter, told: Sequence[pa.Field]) -> np.ndarray:
    path = ledger.parts.path(commit.part)
    said = {f.name: (partition_value(commit.part, f), f.type) for f in told if f.name in condition.columns}
    found, first = [], 0
    try:
        with pq.ParquetFile(ledger.parts.open(commit.part)) as part:
            read = [name for name in condition.columns if name not in said] or part.schema_arrow.names[:1]
            for batch in part.iter_batches(LOOK_ROWS, columns=read):
                rows = pa.table(batch.columns, names=batch.schema.names)
                for name, (value, kind) in said.items():
                    rows = rows.append_column(name, pa.array([value] * len(rows), kind))
                found.append(first + np.flatnonzero(condition.mask(rows, str(path))))
                first += len(rows)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None
    return np.concatenate(found).astype(np.uint32)


def _damaged(path: Any, error: Exception) -> IntegrityError:
    return IntegrityError(f"{path} cannot be read: {one_line(error)}. `batchinfer verify` tells what else is damaged")
