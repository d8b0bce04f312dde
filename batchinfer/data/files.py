"""Input files: where they are, what their footers say, and the columns that they have in common."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import DriftError, InputError

SUFFIXES = (".parquet", ".parq", ".pq")


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


def find(paths: Sequence[str], output: str | None) -> dict[str, str]:
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


def look(name: str, path: str) -> tuple[InputFile, pa.Schema]:
    """A file and its columns, as its footer has them. Raises: InputError if it is not Parquet that a job can read."""
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
        raise InputError(f"{path} is not a readable Parquet file: {one_line(error)}") from None
    if not schema.names:
        raise InputError(f"{path} has no columns; a prompt needs at least one")
    if twice := sorted({column for column in schema.names if schema.names.count(column) > 1}):
        raise InputError(f"{path} has several columns named {', '.join(twice)}; rename them")
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return InputFile(name, path, stat.st_size, stat.st_mtime_ns, footer, groups), schema.remove_metadata()


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
