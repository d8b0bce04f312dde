"""Journal: the write-ahead log of finished rows, so that a killed run recomputes only what was in flight."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.data.source import Unit
from batchinfer.data.stats import OTHER, failures
from batchinfer.data.store import Store
from batchinfer.data.threads import Halt, Worker
from batchinfer.errors import EngineError
from batchinfer.request import Completion, FinishReason

FRAME = struct.Struct("<II")  # length of an Arrow IPC message and its CRC-32
MOST_KINDS = 50  # of failure, that a tally tells apart
LEAST_GAP = 0.02  # seconds between two syncs: a fast engine gets larger groups instead of more of them


@dataclass(slots=True)
class OpenUnit:
    """A unit some of whose rows are unfinished."""

    unit: Unit
    carried: pa.Table  # its input columns, on their way to the output
    batches: list[pa.RecordBatch]  # finished rows, in the order they finished
    missing: int
    logs: list[str]  # files under wal/ that hold some of its rows


@dataclass(frozen=True, slots=True)
class FinishedUnit:
    unit: Unit
    carried: pa.Table
    results: pa.Table  # one row for each of the unit's, in their order
    logs: list[str]


@dataclass(slots=True)
class Tally:
    """Counts of rows and tokens. A row with an error has failed, unless it was to be skipped."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # kind → rows, see stats.kind_of

    def add(self, results: pa.RecordBatch | pa.Table) -> Tally:
        reasons, made = results["finish_reason"], results["completion_tokens"]
        if pa.types.is_list(reasons.type):
            reasons, made = pc.list_flatten(reasons), pc.list_flatten(made)
        self.rows += results.num_rows
        skipped = self.skipped
        self.prompt_tokens += pc.sum(results["prompt_tokens"]).as_py() or 0
        self.completion_tokens += pc.sum(made).as_py() or 0
        for reason in pc.value_counts(reasons):
            self.finish_reasons[reason["values"].as_py()] += reason["counts"].as_py()
        failed = results.num_rows - results["error"].null_count - (self.skipped - skipped)
        self.failed += failed
        if failed:
            for _, kind in failures(results):
                self.failures[kind if kind in self.failures or len(self.failures) < MOST_KINDS else OTHER] += 1
        return self

    @property
    def skipped(self) -> int:
        return self.finish_reasons["skipped"]

    @property
    def losses(self) -> str:
        """`` (3 failed, 1 skipped)``, or nothing."""
        counts = ((self.failed, "failed"), (self.skipped, "skipped"))
        told = ", ".join(f"{count:,} {what}" for count, what in counts if count)
        return f" ({told})" if told else ""


class ResultSchema:
    """The columns that a run adds, and how completions become them. With ``n > 1`` most are lists."""

    def __init__(self, n: int) -> None:
        self.n = n
        many = (lambda kind: kind) if n == 1 else pa.list_
        self.columns = pa.schema(
            {
                "completion": many(pa.string()),
                "finish_reason": many(pa.string()),
                "prompt_tokens": pa.int32(),
                "completion_tokens": many(pa.int32()),
                "error": pa.string(),
            }
        )
        self.logged = self.columns.insert(0, pa.field("row", pa.int32()))  # row within the unit

    def batch(self, completions: Sequence[Completion]) -> pa.RecordBatch:
        """One record batch for completions of one unit, whose keys are (unit, row)."""
        if self.n == 1:
            outputs = [c.outputs[0] if c.outputs else None for c in completions]
            texts = [o.text if o else None for o in outputs]
            reasons = [o.finish_reason if o else _without_output(c) for o, c in zip(outputs, completions)]
            made = [len(o.token_ids) if o else None for o in outputs]
        else:
            texts = [[o.text for o in c.outputs] or None for c in completions]
            reasons = [[o.finish_reason for o in c.outputs] or [_without_output(c)] for c in completions]
            made = [[len(o.token_ids) for o in c.outputs] or None for c in completions]
        columns = [
            [c.key[1] for c in completions],  # type: ignore[index]
            texts,
            reasons,
            [c.prompt_tokens for c in completions],
            made,
            [c.error if c.outputs or c.error else "the engine gave no completion" for c in completions],
        ]
        return pa.record_batch(
            [_array(values, kind.type) for values, kind in zip(columns, self.logged)], schema=self.logged
        )

    @cached_property
    def preamble(self) -> bytes:
        return _frame(self.logged.serialize())


class Journal(Worker):
    """Collects finished rows, logs them in groups, and delivers units whose rows are all there.

    A log is a sequence of frames, each an Arrow IPC message (the schema first, then record batches) with its length and
    CRC, appended with one write and one fsync a group. A row waits for its fsync ``sync_seconds`` at most, and fewer
    than ``sync_rows`` wait, except that syncs keep ``LEAST_GAP`` apart. Rows that complete their unit skip the log, as
    the unit's part is written at once. In an object store a sync is one more object for each unit with fresh rows, so
    that finished rows outlive the machine, less those of the last ``sync_seconds``.

    Args:
        retry: the number of the retry that the rows are for; 0: the run.

    Raises (through ``halt``): EngineError if a row comes back twice or was never asked for.
    """

    def __init__(
        self,
        store: Store,
        epoch: int,
        results: ResultSchema,
        sync: tuple[float, int],
        deliver: Callable[[FinishedUnit], bool],
        halt: Halt,
        retry: int = 0,
    ) -> None:
        super().__init__("journal", halt)
        self.tally = Tally()  # of this run
        self.recovered = 0  # rows found in logs, so far
        self._store, self._epoch, self._results, self._deliver = store, epoch, results, deliver
        self._retry = retry
        self._sync_seconds, self._sync_rows = (sync[0], sync[1]) if sync[0] > 0 else (1.0, 1)
        self._units: dict[int, OpenUnit] = {}
        self._finished: deque[Completion] = deque()
        self._wake = threading.Event()
        self._closing = False

    def __enter__(self) -> Journal:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Log what has finished, deliver what is complete. Does nothing more after a failure of this thread."""
        self._closing = True
        self._wake.set()
        self.join()

    def expect(self, unit: Unit, carried: pa.Table) -> list[int]:
        """Open a unit. Returns its rows that are still to be computed; the others were in its log."""
        logs = self._logs()[unit.index]
        batches, rows = self._recover(logs)
        self.recovered += len(rows)
        opened = OpenUnit(unit, carried, batches, unit.rows - len(rows), logs)
        if opened.missing:
            self._units[unit.index] = opened
            return [row for row in range(unit.rows) if row not in rows] if rows else range(unit.rows)  # type: ignore
        self._deliver(self._finish(opened))
        return []

    def add(self, completion: Completion) -> None:
        """Take a finished row; from any thread, and cheap."""
        self._finished.append(completion)
        if len(self._finished) >= self._sync_rows and not self._wake.is_set():
            self._wake.set()

    def logged(self, units: Iterable[Unit]) -> int:
        """Finished rows of some unfinished units, once it is closed: a later run need not compute them."""
        logs = self._logs()
        return sum(len(self._recover(logs[unit.index])[1]) for unit in units)

    def work(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(self._sync_seconds)
            self._wake.clear()  # before the flag is read: who sets it then wakes the next wait
            closing = self._closing
            if group := [self._finished.popleft() for _ in range(len(self._finished))]:
                self._record(group)
                if not closing and not self._closing:
                    time.sleep(LEAST_GAP)

    def _record(self, group: list[Completion]) -> None:
        by_unit: dict[int, list[Completion]] = defaultdict(list)
        for completion in group:
            by_unit[completion.key[0]].append(completion)  # type: ignore[index]
        for index, completions in by_unit.items():
            if (opened := self._units.get(index)) is None:
                raise EngineError(f"the engine returned row {completions[0].key}, which it was not asked for or twice")
            with self.timed("journal.encode"):
                batch = self._results.batch(completions)
                self.tally.add(batch)
            opened.batches.append(batch)
            opened.missing -= len(completions)
            if opened.missing <= 0:
                del self._units[index]
                with self.timed("journal.order"):
                    finished = self._finish(opened)
                if self._deliver(finished):
                    continue
            with self.timed("journal.write"):
                self._log(opened, batch)

    def _log(self, opened: OpenUnit, batch: pa.RecordBatch) -> None:
        name = f"wal/{_log_name(opened.unit.index, self._epoch, self._retry)}"
        frame = _frame(batch.serialize())
        if name in opened.logs:
            self._store.append(name, frame)
        else:
            self._store.append(name, self._results.preamble + frame)
            self._store.sync("wal")
            opened.logs.append(name)

    def _finish(self, opened: OpenUnit) -> FinishedUnit:
        table = pa.Table.from_batches(opened.batches, self._results.logged).combine_chunks()
        in_order = pa.array(range(opened.unit.rows), pa.int32())
        if not _same(table["row"], in_order):
            table = table.take(pc.sort_indices(table["row"]))
            if not _same(table["row"], in_order):
                raise EngineError(f"the engine returned a row of unit {opened.unit.index} ({opened.unit.file}) twice")
        return FinishedUnit(opened.unit, opened.carried, table.drop_columns(["row"]), opened.logs)

    def _logs(self) -> dict[int, list[str]]:
        """What each unit's logs are called."""
        logs: dict[int, list[str]] = defaultdict(list)
        for name in self._store.list("wal", ".arrows"):
            unit, retry = log_of(name)
            if retry == self._retry:
                logs[unit].append(f"wal/{name}")
        return logs

    def _read(self, name: str) -> bytes:
        """A log; nothing of one whose unit another run has committed meanwhile."""
        try:
            return self._store.read(name)
        except FileNotFoundError:
            return b""

    def _recover(self, logs: list[str]) -> tuple[list[pa.RecordBatch], set[int]]:
        batches, rows = [], set()
        for name in logs:
            for batch in read_log(self._read(name), self._results.logged):
                fresh = [i for i, row in enumerate(batch["row"].to_pylist()) if row not in rows]
                batch = batch if len(fresh) == batch.num_rows else batch.take(pa.array(fresh, pa.int64()))
                rows.update(batch["row"].to_pylist())
                batches.append(batch)
        return batches, rows


def _log_name(unit: int, epoch: int, retry: int) -> str:
    return f"{unit:06d}.{epoch}.{retry}.arrows" if retry else f"{unit:06d}.{epoch}.arrows"


def log_of(name: str) -> tuple[int, int]:
    """The unit whose rows a file under wal/ holds, and the retry that they are for; 0: the run."""
    unit, _, *retry = name.split(".")[:-1]
    return int(unit), int(retry[0]) if retry else 0


def read_log(data: bytes, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The whole record batches of a log; ends quietly at the first torn or damaged frame."""
    buffer, at = pa.py_buffer(data), 0
    while at + FRAME.size <= len(data):
        length, crc = FRAME.unpack_from(data, at)
        if not 0 < length <= len(data) - at - FRAME.size:
            return
        message = buffer.slice(at + FRAME.size, length)
        if zlib.crc32(message) != crc:
            return
        if at == 0:
            if not pa.ipc.read_schema(message).equals(schema):
                return
        else:
            yield pa.ipc.read_record_batch(message, schema)
        at += FRAME.size + length


def _without_output(completion: Completion) -> FinishReason:
    return "skipped" if completion.skipped else "error"


def _frame(message: pa.Buffer) -> bytes:
    return FRAME.pack(message.size, zlib.crc32(message)) + message.to_pybytes()


def _same(column: pa.ChunkedArray, wanted: pa.Array) -> bool:
    return len(column) == len(wanted) and (not len(wanted) or column.chunk(0).equals(wanted))


def _array(values: list, kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 and so Parquet cannot hold
        return pa.array([_replaced(value) for value in values], kind)


def _replaced(value: str | list[str] | None) -> str | list[str] | None:
    if isinstance(value, list):
        return [_replaced(item) for item in value]  # type: ignore[misc]
    return value if value is None else value.encode("utf-8", "replace").decode("utf-8")
