"""Units: some rows of one file each, how a file is cut into them, and how they are read."""

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
class Unit:
    """Some rows of one file, ascending: the grain of commits and of output parts. Never changes once planned."""

    index: int
    file: str  # InputFile.name
    first_row: int
    rows: int
    row_groups: tuple[int, int]  # first and last that hold its rows
    picked: np.ndarray | None = field(default=None, compare=False)  # its rows, from first_row on; None: all that follow

    @property
    def end_row(self) -> int:
        """The row of the file behind its last one."""
        return self.first_row + (self.rows if self.picked is None else int(self.picked[-1]) + 1)

    def row_numbers(self, rows: Sequence[int]) -> list[int]:
        """Which rows of the file some rows of the unit are."""
        if self.picked is None:
            return [self.first_row + row for row in rows]
        return (self.picked[rows].astype(np.int64) + self.first_row).tolist()


def cut_up(file: InputFile, rows: range | np.ndarray, unit_rows: int, index: int) -> list[Unit]:
    """Units of at most so many of the ``rows`` each, numbered from ``index``."""
    ends = list(accumulate(file.row_groups))
    units = []
    for at in range(0, len(rows), unit_rows):
        some = rows[at : at + unit_rows]
        first, last = int(some[0]), int(some[-1])
        picked = None if last - first + 1 == len(some) else (np.asarray(some) - first).astype(np.uint32)
        groups = bisect_right(ends, first), bisect_right(ends, last)
        units.append(Unit(index + len(units), file.name, first, len(some), groups, picked))
    return units


def empty(file: InputFile, index: int) -> Unit:
    """A unit without rows, so that there is a part that has the columns."""
    return Unit(index, file.name, 0, 0, (0, 0))


def pick(unit: Unit, rows: np.ndarray, file: InputFile) -> Unit:
    """Some rows of a unit, ascending, as a unit of the same index."""
    [picked] = cut_up(file, np.asarray(unit.row_numbers(rows)), len(rows), unit.index)
    return picked


def runs(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Group units of a file whose row groups touch or follow each other, so that one pass can read them."""
    run: list[Unit] = []
    for unit in units:
        if run and unit.row_groups[0] > run[-1].row_groups[1] + 1:
            yield run
            run = []
        run.append(unit)
    if run:
        yield run


def cut(
    parquet: pq.ParquetFile, file: InputFile, units: list[Unit], schema: pa.Schema
) -> Iterator[tuple[Unit, pa.Table]]:
    """Stream the row groups of ``units``, all of one run of a file, once, and cut the stream into their tables.

    Raises: pyarrow's exceptions for what is not as the footer says.
    """
    first, last = units[0].row_groups[0], units[-1].row_groups[1]
    inside = parquet.schema_arrow.names
    present = [name for name in schema.names if name in inside] or inside[:1]
    told = {column.name: partition_value(file.name, column) for column in schema if is_partition(column)}
    batches = parquet.iter_batches(
        batch_size=min(max(max(unit.end_row - unit.first_row for unit in units), 256), MOST_BATCH_ROWS),
        row_groups=range(first, min(last + 1, parquet.num_row_groups)),
        columns=present,
    )
    position = sum(file.row_groups[:first])  # of the first row held
    held: deque[pa.RecordBatch] = deque()
    for unit in units:
        pieces: list[pa.RecordBatch] = []
        wanted, end = unit.first_row, unit.end_row
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
            piece = batch.slice(skip, take)
            pieces += _picked(unit, piece, wanted - unit.first_row)
            wanted += piece.num_rows
            if skip + take < batch.num_rows:
                held.append(batch.slice(skip + take))
                position = wanted
            else:
                position += batch.num_rows
        yield unit, _fit(pieces, schema, told)


def _picked(unit: Unit, piece: pa.RecordBatch, begin: int) -> list[pa.RecordBatch]:
    """The unit's own rows of a piece, ``begin`` rows behind its first."""
    if unit.picked is None:
        return [piece]
    low, high = np.searchsorted(unit.picked, [begin, begin + piece.num_rows])
    rows = unit.picked[low:high] - begin
    if not len(rows):
        return []
    try:
        return [piece.take(pa.array(rows))]
    except pa.ArrowNotImplementedError:  # string_view, which then keeps the whole piece in memory
        return [piece.slice(row, 1) for row in rows.tolist()]


def _fit(pieces: list[pa.RecordBatch], schema: pa.Schema, told: Mapping[str, Any]) -> pa.Table:
    """The pieces as one table of exactly ``schema``. ``told``: values of columns that folders tell."""
    if not pieces:
        return schema.empty_table()
    table = pa.Table.from_batches(pieces)
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
