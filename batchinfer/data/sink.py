"""Sink: finished units become Parquet parts, written and committed on a thread of their own."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.columns import find_column
from batchinfer.data.commits import Commit
from batchinfer.data.journal import FinishedUnit, ResultSchema, Tally
from batchinfer.data.ledger import Ledger
from batchinfer.data.partitions import is_partition
from batchinfer.data.threads import Halt, Worker
from batchinfer.errors import JobError
from batchinfer.job import OutputSection

MOST_GROUPED = 8  # units that share the syncs of one commit
BUSY = 16  # units waiting to be written beyond which a finished row may not count on being written at once


class OutputSchema:
    """Which input columns are carried and what the result columns are called.

    Args:
        id_column: carried whether or not ``output`` names it.

    Raises:
        InputError: output.columns or input.id_column names a column that the input lacks.
        JobError: a result column would hide an input column.
    """

    def __init__(
        self, output: OutputSection, available: pa.Schema, results: ResultSchema, id_column: str | None = None
    ) -> None:
        named = () if id_column is None else (id_column,)
        for name in named:
            find_column(available, name, "input.id_column")
        for name in output.columns or ():
            find_column(available, name, "output.columns")
        own = [column.name for column in available if not is_partition(column)]  # their folders say the others
        wanted = own if output.columns is None else dict.fromkeys((*named, *output.columns))
        self.carried = [name for name in wanted if name in own]
        self.results = [output.prefix + name for name in results.columns.names]
        if clash := [name for name in self.results if name in self.carried]:
            raise JobError(
                f"the input has a column {clash[0]!r}, which is also a result column; set output.prefix (for example "
                f'"{_free_prefix(self.results, self.carried)}") or name the input columns to keep in output.columns'
            )

    def part(self, finished: FinishedUnit, metadata: dict[str, str]) -> tuple[pa.Table, dict[str, int]]:
        """The part of a unit, and what its commit says beside what follows from that."""
        table = finished.carried.select(self.carried)
        for name, column in zip(self.results, finished.results.columns):
            table = table.append_column(name, column)
        if any(pa.types.is_dictionary(kind) for kind in table.schema.types):
            table = table.unify_dictionaries()
        return table.combine_chunks().replace_schema_metadata(metadata), {}


class Parts(Protocol):
    """What parts are made by: OutputSchema in a run, Superseding in a retry."""

    results: list[str]

    def part(self, finished: FinishedUnit, metadata: dict[str, str]) -> tuple[pa.Table, dict[str, int]]: ...


class Sink(Worker):
    """Writes parts and commits them, a few units at a time when many are ready.

    ``put`` never waits. A failure to write halts the run; of the units that were put and not committed, those rows are
    computed again that skipped the log (see Journal).

    Args:
        metadata: goes into the footer of each part.
    """

    def __init__(
        self,
        ledger: Ledger,
        parts: Parts,
        compression: str,
        metadata: dict[str, str],
        committed: Callable[[FinishedUnit], None],
        halt: Halt,
    ) -> None:
        super().__init__("sink", halt)
        self._ledger, self._parts, self._compression, self._committed = ledger, parts, compression, committed
        self._metadata = {**metadata, "batchinfer.fingerprint": ledger.fingerprint}
        self._ready: queue.SimpleQueue[FinishedUnit | None] = queue.SimpleQueue()

    def __enter__(self) -> Sink:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Commit what was put. Does nothing more after a failure of this thread."""
        self._ready.put(None)
        self.join()

    def put(self, finished: FinishedUnit) -> bool:
        """Have a unit written. False if it may take a while, so that its rows had better be logged meanwhile."""
        self._ready.put(finished)
        return self._ready.qsize() < BUSY

    def work(self) -> None:
        last = False
        while not last:
            group = [self._ready.get()]
            while len(group) < MOST_GROUPED and not self._ready.empty():
                group.append(self._ready.get())
            last = group[-1] is None
            self._write([finished for finished in group if finished is not None])

    def _write(self, group: list[FinishedUnit]) -> None:
        if not group:
            return
        commits = [self._stage(finished) for finished in group]
        with self.timed("sink.commit"):
            self._ledger.commit(commits)
        for finished in group:
            self._ledger.store.remove(finished.logs)
            self._committed(finished)

    def _stage(self, finished: FinishedUnit) -> Commit:
        ledger, unit = self._ledger, self._ledger.units[finished.unit.index]
        with self.timed("sink.encode"):
            table, more = self._parts.part(finished, {**self._metadata, "batchinfer.unit": str(unit.index)})
            stream = pa.BufferOutputStream()
            pq.write_table(table, stream, compression=self._compression)
            part = stream.getvalue()
        with self.timed("sink.write"):
            ledger.stage(unit, part)
        tally = Tally().add(table.select(self._parts.results).rename_columns(finished.results.column_names))
        return Commit(
            unit=unit.index,
            part=ledger.part_name(unit),
            rows=unit.rows,
            bytes=part.size,
            sha256=hashlib.sha256(part).hexdigest(),
            file=unit.file,
            first_row=unit.first_row,
            failed=tally.failed,
            finish_reasons=dict(tally.finish_reasons),
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            fingerprint=ledger.fingerprint,
            epoch=ledger.epoch,
            failures=dict(tally.failures),
            **more,
        )


def _free_prefix(results: list[str], carried: list[str]) -> str:
    candidates = ["llm_", *(f"llm{i}_" for i in range(2, 100))]
    return next((p for p in candidates if not any(p + name in carried for name in results)), "out_")
