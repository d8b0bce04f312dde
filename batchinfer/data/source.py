"""Source: Parquet files as one stream of frozen units, read ahead on a thread of its own."""

from __future__ import annotations

import copy
import glob
import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import DriftError, InputError

SUFFIXES = (".parquet", ".parq", ".pq")
MOST_BATCH_ROWS = 4096
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
    """A run of rows of one file: the grain of commits and of output parts. Never changes once planned."""

    index: int
    file: str  # InputFile.name
    first_row: int
    rows: int
    row_groups: tuple[int, int]  # first and last that hold its rows


class Source:
    """All input files and their common schema. The job's own ``output``, and its forks, are passed over among them.

    Files may differ in the order of columns, lack columns (read as null) and differ in types where one holds the
    other, int32 and int64 for instance.

    Raises:
        InputError: a path is missing, a glob or folder is empty, a file is not Parquet, has no columns, or does not fit
            the others; the message names the file.
    """

    def __init__(self, paths: Sequence[str], output: str | None = None) -> None:
        names = _find(paths, output)
        with ThreadPoolExecutor(16) as pool:
            looked = list(pool.map(_look, names, names.values()))
        self.files = {file.name: file for file, _ in looked}
        self._schemas = {file.name: (file.path, schema) for file, schema in looked}
        self.schema = _unify(list(self._schemas.values()))

    def only(self, names: Iterable[str]) -> Source:
        """The same source with these of its files, in this order, and the schema that they have in common."""
        fewer = copy.copy(self)
        fewer.files = {name: self.files[name] for name in names}
        fewer.schema = _unify([self._schemas[name] for name in fewer.files])
        return fewer

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files.values())

    def units(self, unit_rows: int) -> list[Unit]:
        """Cut every file into units of at most ``unit_rows`` rows. An empty file is one empty unit."""
        units: list[Unit] = []
        for file in self.files.values():
            ends = list(accumulate(file.row_groups)) or [0]
            group = 0
            for first in range(0, max(file.rows, 1), unit_rows):
                rows = min(unit_rows, file.rows - first)
                while group < len(ends) - 1 and ends[group] <= first:
                    group += 1
                last = group
                while last < len(ends) - 1 and ends[last] < first + rows:
                    last += 1
                units.append(Unit(len(units), file.name, first, rows, (group, last)))
        return units

    def read(self, units: Iterable[Unit], columns: Sequence[str]) -> Iterator[tuple[Unit, pa.Table]]:
        """Yield the rows of each unit, in the order of ``units`` (ascending within a file).

        Every row group is decoded at most once, and only if a unit asks for rows of it; memory holds a few batches,
        never a row group. Two units are read ahead on a thread.
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


def _cut(
    parquet: pq.ParquetFile, file: InputFile, units: list[Unit], schema: pa.Schema
) -> Iterator[tuple[Unit, pa.Table]]:
    """Stream the row groups of ``units`` once and cut the stream into their tables."""
    first, last = units[0].row_groups[0], units[-1].row_groups[1]
    present = [name for name in schema.names if name in parquet.schema_arrow.names]
    batches = parquet.iter_batches(
        batch_size=min(max(max(unit.rows for unit in units), 256), MOST_BATCH_ROWS),
        row_groups=range(first, min(last + 1, parquet.num_row_groups)),
        columns=present,
    )
    position = sum(file.row_groups[:first])  # of the first row held
    held: deque[pa.RecordBatch] = deque()
    for unit in units:
        pieces: list[pa.RecordBatch] = []
        wanted, end = unit.first_row, unit.first_row + unit.rows
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
            pieces.append(batch.slice(skip, take))
            wanted += pieces[-1].num_rows
            if skip + take < batch.num_rows:
                held.append(batch.slice(skip + take))
                position = wanted
            else:
                position += batch.num_rows
        yield unit, _fit(pieces, schema)


def _fit(pieces: list[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """The pieces as one table of exactly ``schema``."""
    if not pieces:
        return schema.empty_table()
    table = pa.Table.from_batches(pieces)
    if table.schema.equals(schema):
        return table
    rows = table.num_rows
    columns = [
        table[field.name].cast(field.type) if field.name in table.schema.names else pa.nulls(rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


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
