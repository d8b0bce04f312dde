"""Units: some rows of the input each, how it is cut into them, and how they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.files import InputFile
from batchinfer.data.partitions import is_partition, partition_value

MOST_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one file, ascending."""

    file: str  # InputFile.name
    first_row: int
    rows: int
    row_groups: tuple[int, int]  # first and last that hold its rows
    picked: np.ndarray | None = field(default=None, compare=False)  # its rows, from first_row on; None: all that follow

    @property
    def end_row(self) -> int:
        """The row of the file behind its last one."""
        return self.first_row + (self.rows if self.picked is None else int(self.picked[-1]) + 1)

    def row_numbers(self, rows: np.ndarray) -> list[int]:
        """Which rows of the file some rows of the piece are."""
        own = rows if self.picked is None else self.picked[rows].astype(np.int64)
        return (own + self.first_row).tolist()


@dataclass(frozen=True, slots=True)
class Unit:
    """Some rows of the files of one folder, in their order: the grain of commits and of output parts.

    Files that are smaller than a unit share one. Never changes once planned.
    """

    index: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def file(self) -> str:
        """That of its first row."""
        return self.pieces[0].file

    @property
    def first_row(self) -> int:
        return self.pieces[0].first_row

    @property
    def folder(self) -> str:
        """Where its files are, below the input's root."""
        return self.file.rpartition("/")[0]

    def addresses(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[str, list[int]]]:
        """Where some rows of the unit, ascending, come from: file after file with the numbers of its rows."""
        rows, begin = np.asarray(rows, np.int64), 0
        for piece in self.pieces:
            low, high = np.searchsorted(rows, [begin, begin + piece.rows])
            if low < high:
                yield piece.file, piece.row_numbers(rows[low:high] - begin)
            begin += piece.rows


def pieces(file: InputFile, rows: range | np.ndarray, room: int, most: int) -> Iterator[Piece]:
    """Cut rows of a file: ``room`` of them into the first piece, ``most`` into each that follows."""
    ends = list(accumulate(file.row_groups))
    at = 0
    while at < len(rows):
        some = rows[at : at + room]
        first, last = int(some[0]), int(some[-1])
        picked = None if last - first + 1 == len(some) else (np.asarray(some) - first).astype(np.uint32)
        groups = bisect_right(ends, first), bisect_right(ends, last)
        yield Piece(file.name, first, len(some), groups, picked)
        at, room = at + room, most


def fill(chosen: Iterable[tuple[InputFile, range | np.ndarray]], unit_rows: int) -> Iterator[tuple[Piece, ...]]:
    """Pieces that make up a unit each: ``unit_rows`` rows of one file or of several, fewer in the last."""
    held: list[Piece] = []
    room = unit_rows
    for file, rows in chosen:
        for piece in pieces(file, rows, room, unit_rows):
            held.append(piece)
            room -= piece.rows
            if not room:
                yield tuple(held)
                held, room = [], unit_rows
    if held:
        yield tuple(held)


def empty(file: InputFile) -> tuple[Piece, ...]:
    """Of a unit without rows, so that there is a part that has the columns."""
    return (Piece(file.name, 0, 0, (0, 0)),)


def pick(unit: Unit, rows: np.ndarray, files: Mapping[str, InputFile]) -> Unit:
    """Some rows of a unit, ascending, as a unit of the same index."""
    own = ((files[name], np.asarray(numbers)) for name, numbers in unit.addresses(rows))
    return Unit(unit.index, next(fill(own, len(rows))))


def runs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces of a file whose row groups touch or follow each other, so that one pass can read them."""
    run: list[Piece] = []
    for piece in pieces:
        if run and piece.row_groups[0] > run[-1].row_groups[1] + 1:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def cut(
    parquet: pq.ParquetFile, file: InputFile, run: list[Piece], schema: pa.Schema
) -> Iterator[tuple[Piece, pa.Table]]:
    """Stream the row groups of the pieces of one run of a file once, and cut the stream into their tables.

    Raises: pyarrow's exceptions for what is not as the footer says.
    """
    first, last = run[0].row_groups[0], run[-1].row_groups[1]
    inside = parquet.schema_arrow.names
    present = [name for name in schema.names if name in inside] or inside[:1]
    told = {column.name: partition_value(file.name, column) for column in schema if is_partition(column)}
    batches = parquet.iter_batches(
        batch_size=min(max(max(piece.end_row - piece.first_row for piece in run), 256), MOST_BATCH_ROWS),
        row_groups=range(first, min(last + 1, parquet.num_row_groups)),
        columns=present,
    )
    position = sum(file.row_groups[:first])  # of the first row held
    held: deque[pa.RecordBatch] = deque()
    for piece in run:
        own: list[pa.RecordBatch] = []
        wanted, end = piece.first_row, piece.end_row
        while wanted < end:
            if not held:
                batch = next(batches, None)
                if batch is None:
                    raise pa.ArrowInvalid(f"it ends before row {wanted}, its footer promises {file.rows} rows")
                held.append(batch)
            batch = held.popleft()
            skip, take = wanted - position, end - wanted
            if skip >= batch.num_rows:
                position += batch.num_rows
                continue
            some = batch.slice(skip, take)
            own += _picked(piece, some, wanted - piece.first_row)
            wanted += some.num_rows
            if skip + take < batch.num_rows:
                held.append(batch.slice(skip + take))
                position = wanted
            else:
                position += batch.num_rows
        yield piece, _fit(own, schema, told)


def _picked(piece: Piece, batch: pa.RecordBatch, begin: int) -> list[pa.RecordBatch]:
    """The piece's own rows of a batch, which lies ``begin`` rows behind its first."""
    if piece.picked is None:
        return [batch]
    low, high = np.searchsorted(piece.picked, [begin, begin + batch.num_rows])
    rows = piece.picked[low:high] - begin
    if not len(rows):
        return []
    try:
        return [batch.take(pa.array(rows))]
    except pa.ArrowNotImplementedError:  # string_view, which then keeps the whole batch in memory
        return [batch.slice(row, 1) for row in rows.tolist()]


def _fit(batches: list[pa.RecordBatch], schema: pa.Schema, told: Mapping[str, Any]) -> pa.Table:
    """Batches of a file as one table of exactly ``schema``. ``told``: values of columns that folders tell."""
    if not batches:
        return schema.empty_table()
    table = pa.Table.from_batches(batches)
    if table.schema.equals(schema):
        return table
    rows = table.num_rows
    columns = [
        table[column.name].cast(column.type)
        if column.name in table.schema.names
        else _repeated(told.get(column.name), column.type, rows)
        for column in schema
    ]
    return pa.table(columns, schema=schema)


def _repeated(value: Any, kind: pa.DataType, rows: int) -> pa.Array:
    return pa.nulls(rows, kind) if value is None else pa.repeat(pa.scalar(value, kind), rows)
