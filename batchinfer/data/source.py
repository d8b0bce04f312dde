"""Source: Parquet files as one stream of frozen units, read ahead on a thread of its own."""

from __future__ import annotations

import copy
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, groupby
from typing import TypeVar

import numpy as np
import pyarrow as pa

from batchinfer.data.columns import find_column
from batchinfer.data.files import InputFile, look, one_line, unify
from batchinfer.data.listing import find
from batchinfer.data.partitions import partition_fields
from batchinfer.data.selection import Selection
from batchinfer.data.units import Piece, Unit, cut, empty, fill, pieces, runs
from batchinfer.errors import InputError
from batchinfer.job import InputSection, Job

LOOK_ROWS = 1 << 16  # among which rows are chosen at a time
T = TypeVar("T")


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
        names = find(paths, output)
        with ThreadPoolExecutor(16) as pool:
            looked = list(pool.map(look, names, names.values()))
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
        columns = unify([self._schemas[name] for name in self.files])
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
        """Cut the files into units of ``unit_rows`` rows; the last of each folder may have fewer. A folder without rows
        is one empty unit.

        Where rows are chosen it is done here, once and for good: a filter reads its columns of the whole input, sample
        and limit read nothing. A folder none of whose rows are chosen has no unit, unless no folder had any.

        Args:
            taken: rows chosen earlier, from other files, that count towards the limit.
        """
        made: list[tuple[Piece, ...]] = []
        for _, chosen in groupby(self._rows(taken), key=lambda own: own[0].name.rpartition("/")[0]):
            made += self._of_folder(chosen, unit_rows)
        made = made or [empty(file) for file in self.files.values()][:1]
        return [Unit(index, of_unit) for index, of_unit in enumerate(made)]

    def _of_folder(
        self, chosen: Iterator[tuple[InputFile, range | np.ndarray]], unit_rows: int
    ) -> list[tuple[Piece, ...]]:
        first = next(chosen)
        made = list(fill(chain([first], chosen), unit_rows))
        return made if made or self.chooses else [empty(first[0])]

    def _rows(self, taken: int) -> Iterator[tuple[InputFile, range | np.ndarray]]:
        """Every file and which of its rows the job is about."""
        for file in self.files.values():
            rows = range(file.rows) if self._selection is None else self._chosen(file, self._selection, taken)
            taken += len(rows)
            yield file, rows

    def _chosen(self, file: InputFile, selection: Selection, taken: int) -> np.ndarray:
        """Numbers of the chosen rows of a file, up to the limit."""
        left = file.rows if selection.limit is None else max(selection.limit - taken, 0)
        looked = pieces(file, range(file.rows if left else 0), LOOK_ROWS, LOOK_ROWS)
        schema = pa.schema([self._everything.field(name) for name in selection.columns])
        found = [np.empty(0, np.int64)]
        with closing(self._read(looked, schema) if selection.columns else ((piece, None) for piece in looked)) as read:
            for piece, rows in read:
                some = np.flatnonzero(selection.mask(file.name, piece.first_row, piece.rows, rows))[:left]
                found.append(piece.first_row + some)
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
        return _ahead(self._read_units(list(units), schema), depth=2)

    def read_chunks(
        self, chunks: Iterable[Sequence[Unit]], columns: Sequence[str]
    ) -> Iterator[tuple[Unit, pa.Table] | tuple[None, None]]:
        """As ``read`` one after the other, each chunk asked for when the one before it was read.

        An empty chunk is told, as None and None: nothing is there at the moment, and something may follow.
        """
        schema = pa.schema([self.schema.field(name) for name in columns])
        some = (self._read_units(list(units), schema) if units else [(None, None)] for units in chunks)
        return _ahead(itertools.chain.from_iterable(some), depth=2)

    def _read_units(self, units: list[Unit], schema: pa.Schema) -> Iterator[tuple[Unit, pa.Table]]:
        with closing(self._read((piece for unit in units for piece in unit.pieces), schema)) as read:
            for unit in units:
                yield unit, pa.concat_tables([next(read)[1] for _ in unit.pieces])

    def _read(self, pieces: Iterable[Piece], schema: pa.Schema) -> Iterator[tuple[Piece, pa.Table]]:
        for name, of_file in groupby(pieces, key=lambda piece: piece.file):
            file = self.files[name]
            try:
                with file.open() as parquet:
                    for run in runs(of_file):
                        yield from cut(parquet, file, run, schema)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{file.path} cannot be read as Parquet: {one_line(error)}") from error


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
