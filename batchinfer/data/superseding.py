"""Superseding: a part some of whose rows were answered again takes the place of the part before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.data.commits import Commit
from batchinfer.data.journal import FinishedUnit, ResultSchema
from batchinfer.data.ledger import Ledger
from batchinfer.errors import IntegrityError

HISTORY = b"batchinfer.retries"  # in a part's footer: what each retry was and which rows of the part it answered


class Superseding:
    """Makes the parts of a retry: of the rows that it chose the new results, of all others and of all other columns
    what was there.

    A row that fails now and had a completion keeps that: an answer, be it cut short, is worth more than an error.

    Args:
        prefix: of the result columns.
    """

    def __init__(self, ledger: Ledger, results: ResultSchema, prefix: str) -> None:
        self._ledger = ledger
        self._error = prefix + "error"
        self.results = [prefix + name for name in results.columns.names]

    def part(self, finished: FinishedUnit, metadata: dict[str, str]) -> tuple[pa.Table, dict[str, int]]:
        """Raises: IntegrityError if the part before is not what was committed; LockedError if another run did that."""
        retry, commit = self._ledger.retry, self._ledger.commits[finished.unit.index]
        assert retry is not None
        old, rows = self._before(commit), retry.rows[commit.unit]
        new = finished.results.rename_columns(self.results)
        answered = pc.or_(new[self._error].is_null(), old[self._error].take(pa.array(rows)).is_valid())
        answered = np.flatnonzero(answered.to_numpy())
        source = np.arange(old.num_rows)
        source[rows[answered]] = old.num_rows + answered
        both = pa.concat_tables([old.select(self.results), new.cast(old.select(self.results).schema)])
        merged, table = both.take(pa.array(source)), old
        for name in self.results:
            table = table.set_column(table.column_names.index(name), old.field(name), merged[name])
        told = {**retry.told(), "rows": ranges(rows[answered].tolist())}
        history = [*json.loads(old.schema.metadata.get(HISTORY, b"[]")), told]
        table = table.combine_chunks().replace_schema_metadata({**old.schema.metadata, HISTORY: json.dumps(history)})
        return table, {"version": commit.version + 1, "retry": retry.number, "superseded": len(answered)}

    def _before(self, commit: Commit) -> pa.Table:
        path = self._ledger.parts.path(commit.part)
        data = self._ledger.parts.read(commit.part)
        if hashlib.sha256(data).hexdigest() != commit.sha256:
            self._ledger.check_current(commit)
            raise IntegrityError(f"{path}: its bytes are not those committed (sha256 differs); `verify` tells more")
        return pq.read_table(pa.BufferReader(data))


def ranges(rows: Iterable[int]) -> str:
    """Ascending numbers, short: ``0-3,7``."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
