"""Input files: where they are, what their footers say, and the columns that they have in common."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.object_file import open_object
from batchinfer.errors import DriftError, InputError
from batchinfer.location import is_remote

LOCAL_BUFFER, REMOTE_BUFFER = 1 << 20, 8 << 20  # bytes of a column read at once


@dataclass(frozen=True, slots=True)
class InputFile:
    """One Parquet file as it was when it was looked at."""

    name: str  # relative to the input's root, with "/": part of every row's address
    path: str
    size: int
    mtime_ns: int | None  # on a disk
    tag: str | None  # in an object store: its ETag, or what that store has for one
    footer: str  # digest of the Parquet footer: schema, row groups, statistics
    row_groups: tuple[int, ...]  # rows of each

    @property
    def rows(self) -> int:
        return sum(self.row_groups)

    def open(self) -> pq.ParquetFile:
        """The file, to be read with a buffer a column.

        Raises: DriftError if it is not the one that was looked at, and in an object store as soon as it is no more.
        """
        try:
            file, version = _open(self.path)
        except OSError as error:
            raise DriftError(f"{self.path} went away during the run: {error.strerror}") from None
        if version != (self.size, self.mtime_ns, self.tag):
            raise DriftError(f"{self.path} changed during the run; its rows would come from two versions of the file")
        buffer = REMOTE_BUFFER if self.tag else LOCAL_BUFFER
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer, page_checksum_verification=True)


def _open(path: str) -> tuple[Any, tuple[int, int | None, str | None]]:
    """A file to read at random, and the size, mtime_ns and tag of an InputFile."""
    if is_remote(path):
        file = open_object(path)
        return file, (file.version.size, None, file.version.tag)
    stat = os.stat(path)
    return pa.OSFile(path), (stat.st_size, stat.st_mtime_ns, None)


def look(name: str, path: str) -> tuple[InputFile, pa.Schema]:
    """A file and its columns, as its footer has them. Raises: InputError if it is not Parquet that a job can read."""
    try:
        stream, version = _open(path)
        with stream:
            metadata = pq.read_metadata(stream)
            schema = metadata.schema.to_arrow_schema()
            stream.seek(-8, os.SEEK_END)  # a Parquet file ends in: footer, its length in 4 bytes, "PAR1"
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(-8 - length, os.SEEK_END)
            footer = hashlib.sha256(stream.read(length)).hexdigest()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a readable Parquet file: {one_line(error)}") from None
    if not schema.names:
        raise InputError(f"{path} has no columns; a prompt needs at least one")
    if twice := sorted({column for column in schema.names if schema.names.count(column) > 1}):
        raise InputError(f"{path} has several columns named {', '.join(twice)}; rename them")
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if sum(groups) != metadata.num_rows or min(groups, default=0) < 0:
        raise InputError(
            f"{path} is damaged: its footer says {metadata.num_rows:,} rows, and {sum(groups):,} in its row groups"
        )
    return InputFile(name, path, *version, footer, groups), schema.remove_metadata()


def unify(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """The columns of all files, each (path, schema). Raises: InputError naming the first file that does not fit."""
    common = schemas[0][1]
    for path, schema in schemas[1:]:
        if schema.equals(common):
            continue
        try:
            common = pa.unify_schemas([common, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{path} does not fit the input files before it: {one_line(error)}") from None
    return common


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).removesuffix(".")
