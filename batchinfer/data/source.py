"""Source: Parquet files as one stream of frozen units, read ahead on a thread of its own."""

from __future__ import annotations

import copy
import glob
import hashlib
import os
import queue
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.columns import find_column
from batchinfer.data.partitions import is_partition, partition_fields, partition_value
from batchinfer.data.selection import Selection
from batchinfer.errors import DriftError, InputError
from batchinfer.job import InputSection, Job

SUFFIXES = (".parquet", ".parq", ".pq")
MOST_BATCH_ROWS = 4096
LOOK_ROWS = 1 << 16  # among which rows are chosen at a time
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InputFile:
    """One Parquet file as it was when it was looked at."""

    name: str  # relative to the input's root, with "/": part of every row's address
    path: str
    size: int
    mtime_ns: int
    footer: str  # digest of the Parquet footer: schema, row groups, statistics
    row_groups: tuple[int, ...]  # rows of each

    @property
    def rows(self) -> int:
        return sum(self.row_groups)

    def check_unchanged(self) -> None:
        """Raises: DriftError if the file is not the one that was looked at."""
        try:
            stat = os.stat(self.path)
        except OSError as error:
            raise DriftError(f"{self.path} went away during the run: {error.strerror}") from None
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DriftError(f"{self.path} changed during the run; its rows would come from two versions of the file")


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


class Source:
    """All input files and their common schema. The job's own ``output``, and its forks, are passed over among them.

    Files may differ in the order of columns, lack columns (read as null) and differ in types where one holds the
    other, int32 and int64 for instance. Folders named ``key=value`` are columns behind all others.

    Args:
        asked: which columns and rows are wanted; all unless given. ``paths`` say where.

    Attributes:
        schema: the columns wanted.

    Raises:
        InputError: a path is missing, a glob or folder is empty, a file is not Parquet, has no columns, or does not fit
            the others; the message names the file. Or a column that is asked for is missing.
        JobError: the filter is not one.
    """

    def __init__(self, paths: Sequence[str], output: str | None = None, asked: InputSection | None = None) -> None:
        names = _find(paths, output)
        with ThreadPoolExecutor(16) as pool:
            looked = list(pool.map(_look, names, names.values()))
        self.files = {file.name: file for file, _ in looked}
        self._schemas = {file.name: (file.path, schema) for file, schema in looked}
        self._asked = asked
        self._look_at_columns()

    @classmethod
    def of(cls, job: Job, output: str | None = None) -> Source:
        """The input of a job. ``output``: where it is begun, if not where the job says."""
        return cls(job.input.path, output or job.output.path, job.input)

    def only(self, names: Iterable[str]) -> Source:
        """The same source with these of its files, in this order, and the schema that they have in common."""
        fewer = copy.copy(self)
        fewer.files = {name: self.files[name] for name in names}
        fewer._look_at_columns()
        return fewer

    def _look_at_columns(self) -> None:
        columns = _unify([self._schemas[name] for name in self.files])
        told = (column for column in partition_fields(self.files) if column.name not in columns.names)
        self._everything = self.schema = pa.schema([*columns, *told])
        self._selection = None
        if self._asked is not None:
            names = self._asked.columns or self.schema.names
            for name in names:
                find_column(self._everything, name, "input.columns")
            self.schema = pa.schema([self._everything.field(name) for name in dict.fromkeys(names)])
            selection = Selection(self._asked, self._everything)
            self._selection = None if selection.everything else selection

    @property
    def rows(self) -> int:
        """Of all files, chosen or not."""
        return sum(file.rows for file in self.files.values())

    @property
    def chooses(self) -> bool:
        """Whether the job is about some of the rows alone."""
        return self._selection is not None

    def units(self, unit_rows: int, taken: int = 0) -> list[Unit]:
        """Cut every file into units of at most ``unit_rows`` rows. An empty file is one empty unit.

        Where rows are chosen it is done here, once and for good: a filter reads its columns of the whole input, sample
        and limit read nothing. A file none of whose rows are chosen has no unit, unless no file had any.

        Args:
            taken: rows chosen earlier, from other files, that count towards the limit.
        """
        units: list[Unit] = []
        for file in self.files.values():
            if self._selection is None:
                units += _cut_up(file, range(file.rows), unit_rows, len(units)) or [_empty(file, len(units))]
            else:
                chosen = self._chosen(file, self._selection, taken)
                taken += len(chosen)
                units += _cut_up(file, chosen, unit_rows, len(units))
        return units or [_empty(file, 0) for file in self.files.values()][:1]

    def _chosen(self, file: InputFile, selection: Selection, taken: int) -> np.ndarray:
        """Numbers of the chosen rows of a file, up to the limit."""
        left = file.rows if selection.limit is None else max(selection.limit - taken, 0)
        looks = _cut_up(file, range(file.rows), LOOK_ROWS, 0) if left else []
        schema = pa.schema([self._everything.field(name) for name in selection.columns])
        found = [np.empty(0, np.int64)]
        with closing(self._read(looks, schema) if selection.columns else ((look, None) for look in looks)) as read:
            for look, rows in read:
                some = np.flatnonzero(selection.mask(file.name, look.first_row, look.rows, rows))[:left]
                found.append(look.first_row + some)
                left -= len(some)
                if not left:
                    break
        return np.concatenate(found)

    def read(self, units: Iterable[Unit], columns: Sequence[str]) -> Iterator[tuple[Unit, pa.Table]]:
        """Yield the rows of each unit, in the order of ``units`` (ascending within a file).

        Every row group is decoded at most once, and only if it lies between a unit's first and last row; memory holds a
        few batches, never a row group. Two units are read ahead on a thread.
        """
        schema = pa.schema([self.schema.field(name) for name in columns])
        return _ahead(self._read(units, schema), depth=2)

    def _read(self, units: Iterable[Unit], schema: pa.Schema) -> Iterator[tuple[Unit, pa.Table]]:
        for name, of_file in groupby(units, key=lambda unit: unit.file):
            file = self.files[name]
            file.check_unchanged()
            try:
                with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20) as parquet:
                    for run in _runs(of_file):
                        yield from _cut(parquet, file, run, schema)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{file.path} cannot be read as Parquet: {_one_line(error)}") from error


def _find(paths: Sequence[str], output: str | None) -> dict[str, str]:
    """Name → path of every input file, sorted by name, which is relative to the deepest folder common to the inputs."""
    found: dict[str, None] = {}
    roots = []
    for given in paths:
        path = os.path.abspath(os.path.expanduser(given))
        if os.path.isdir(path):
            inside = _walk(path)
            if not inside:
                raise InputError(f"the input folder {given} holds no file ending in {', '.join(SUFFIXES)}")
            roots.append(path)
        elif os.path.isfile(path):
            inside = [path]
            roots.append(os.path.dirname(path))
        elif glob.has_magic(path):
            matched = sorted(glob.glob(path, recursive=True))
            inside = [f for m in matched for f in (_walk(m) if os.path.isdir(m) else [m])]
            if not inside:
                raise InputError(f"the input glob {given} matches no file")
            plain = path[: next(i for i, c in enumerate(path) if c in "*?[")]
            roots.append(plain.rpartition("/")[0] or "/")
        else:
            raise InputError(f"no input at {given}: expected a Parquet file, a glob or a folder")
        found.update(dict.fromkeys(inside))
    if output is not None:
        own = tuple(f"{path}{end}" for path in _outputs(output) for end in ("/", ".batchinfer/"))
        found = {path: None for path in found if not path.startswith(own)}
    if not found:
        raise InputError("input.path names nothing but this job's own output; name a Parquet file, a glob or a folder")
    root = os.path.commonpath(roots)
    names = {Path(path).relative_to(root).as_posix(): path for path in found}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"the name of the input file {name!r} is not valid UTF-8; rename it") from None
    return dict(sorted(names.items(), key=lambda item: item[0].split("/")))


def _outputs(output: str) -> list[str]:
    """An output and its forks, OUT-2 and so on, which are known by their control folders."""
    own = os.path.abspath(os.path.expanduser(output))
    beside = (path.removesuffix(".batchinfer") for path in glob.glob(f"{glob.escape(own)}-*.batchinfer"))
    return [own, *(path for path in beside if path[len(own) + 1 :].isdigit())]


def _walk(folder: str) -> list[str]:
    """Parquet files below ``folder``; what starts with ``.`` or ``_`` is somebody's bookkeeping and is passed over."""

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot look into the input folder {error.filename}: {error.strerror}")

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] not in "._"]
        wanted = (name for name in names if name[0] not in "._" and name.lower().endswith(SUFFIXES))
        files += [os.path.join(parent, name) for name in wanted]
    return files


def _look(name: str, path: str) -> tuple[InputFile, pa.Schema]:
    try:
        stat = os.stat(path)
        with open(path, "rb") as stream:
            metadata = pq.read_metadata(stream)
            schema = metadata.schema.to_arrow_schema()
            stream.seek(-8, os.SEEK_END)  # a Parquet file ends in: footer, its length in 4 bytes, "PAR1"
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(-8 - length, os.SEEK_END)
            footer = hashlib.sha256(stream.read(length)).hexdigest()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a readable Parquet file: {_one_line(error)}") from None
    if not schema.names:
        raise InputError(f"{path} has no columns; a prompt needs at least one")
    if twice := sorted({column for column in schema.names if schema.names.count(column) > 1}):
        raise InputError(f"{path} has several columns named {', '.join(twice)}; rename them")
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return InputFile(name, path, stat.st_size, stat.st_mtime_ns, footer, groups), schema.remove_metadata()


def _unify(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    common = schemas[0][1]
    for path, schema in schemas[1:]:
        if schema.equals(common):
            continue
        try:
            common = pa.unify_schemas([common, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{path} does not fit the input files before it: {_one_line(error)}") from None
    return common


def _runs(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Group units of a file whose row groups touch or follow each other, so that one pass can read them."""
    run: list[Unit] = []
    for unit in units:
        if run and unit.row_groups[0] > run[-1].row_groups[1] + 1:
            yield run
            run = []
        run.append(unit)
    if run:
        yield run


def _cut_up(file: InputFile, rows: range | np.ndarray, unit_rows: int, index: int) -> list[Unit]:
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


def _empty(file: InputFile, index: int) -> Unit:
    return Unit(index, file.name, 0, 0, (0, 0))


def _cut(
    parquet: pq.ParquetFile, file: InputFile, units: list[Unit], schema: pa.Schema
) -> Iterator[tuple[Unit, pa.Table]]:
    """Stream the row groups of ``units`` once and cut the stream into their tables."""
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


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Run an iterator on a thread, at most ``depth`` items ahead; its exception is raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
    room = threading.Semaphore(depth)
    closed = False

    def work() -> None:
        error: BaseException | None = None
        try:
            while not closed and (item := next(items, None)) is not None:
                ready.put((item, None))
                room.acquire()
        except BaseException as caught:
            error = caught
        ready.put((None, error))

    thread = threading.Thread(target=work, name="batchinfer-read", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            room.release()
            yield item
    finally:
        closed = True
        room.release()
        thread.join()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).removesuffix(".")
