"""Plan: the frozen units of an output and the files they come from; and whether the input is still that one.

``plan-000.parquet`` is written when an output is begun, ``plan-001.parquet`` and so on when files are appended to its
input. None ever changes. Units are numbered through all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.source import InputFile, Source, Unit
from batchinfer.data.store import Store
from batchinfer.data.units import Piece
from batchinfer.errors import DriftError, IntegrityError

OF_FILE = ("path", "size", "mtime_ns", "tag", "footer")
Files = dict[str, dict[str, Any]]  # name → OF_FILE, in the order of the plan


def name_of(number: int) -> str:
    return f"plan-{number:03d}.parquet"


def read(store: Store) -> tuple[list[Unit], Files, list[int]]:
    """Units, files and how many units each plan has.

    Raises: FileNotFoundError if none was written, IntegrityError if one is damaged or missing.
    """
    names = [name for name in store.list(".", ".parquet") if name.startswith("plan-")]
    made: dict[int, list[Piece]] = {}  # in the order of the plans
    files: Files = {}
    ends = [0]
    for number in range(max(1, len(names))):
        try:
            rows = pq.read_table(pa.BufferReader(store.read(name_of(number))))
            picked = rows["picked"]
        except (ValueError, KeyError, pa.ArrowException) as error:
            raise IntegrityError(f"{store.path(name_of(number))} is damaged: {error}") from None
        for row, own in zip(rows.drop_columns(["picked"]).to_pylist(), picked):
            files[row["file"]] = {key: row.get(key) for key in OF_FILE}
            if row["unit"] is not None:
                groups = (row["first_row_group"], row["last_row_group"])
                numbers = own.values.to_numpy() if own.is_valid else None
                piece = Piece(row["file"], row["first_row"], row["rows"], groups, numbers)
                made.setdefault(row["unit"], []).append(piece)
        ends.append(len(made))
    if list(made) != list(range(len(made))):
        raise IntegrityError(f"the plans in {store.root} do not follow each other: units are missing or there twice")
    units = [Unit(index, tuple(pieces)) for index, pieces in made.items()]
    return units, files, [end - begin for begin, end in pairwise(ends)]


def encode(units: Iterable[Unit], files: Mapping[str, InputFile]) -> bytes:
    """A row for each piece of a unit, and one for each file without any, which may not change either; in the files'
    order."""
    own: dict[str, list[tuple[int | None, Piece | None]]] = {}
    for unit in units:
        for piece in unit.pieces:
            own.setdefault(piece.file, []).append((unit.index, piece))
    rows = [(file, *part) for name, file in files.items() for part in own.get(name, [(None, None)])]
    groups = [piece.row_groups if piece else (None, None) for _, _, piece in rows]

    def of_piece(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([piece and getattr(piece, name) for _, _, piece in rows], kind)

    table = pa.table(
        {
            "unit": pa.array([unit for _, unit, _ in rows], pa.int64()),
            "file": pa.array([file.name for file, _, _ in rows], pa.string()),
            "first_row": of_piece("first_row", pa.int64()),
            "rows": of_piece("rows", pa.int64()),
            "first_row_group": pa.array([first for first, _ in groups], pa.int32()),
            "last_row_group": pa.array([last for _, last in groups], pa.int32()),
            "picked": of_piece("picked", pa.list_(pa.uint32())),
            "path": pa.array([file.path for file, _, _ in rows], pa.string()),
            "size": pa.array([file.size for file, _, _ in rows], pa.int64()),
            "mtime_ns": pa.array([file.mtime_ns for file, _, _ in rows], pa.int64()),
            "tag": pa.array([file.tag for file, _, _ in rows], pa.string()),
            "footer": pa.array([file.footer for file, _, _ in rows], pa.string()),
        }
    )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue().to_pybytes()


def continued(planned: Files, source: Source, on_change: str) -> tuple[Source, list[str]]:
    """The source to go on with, with the columns that the plan was made for, and which of its files are not planned.

    Raises:
        DriftError: a planned file was changed or is gone, whatever ``on_change`` says; files were added that it does
            not allow, or that have other columns.
    """
    _check_unchanged(planned, source)
    before = source.only(planned)
    added = [name for name in source.files if name not in planned]
    if not added or on_change == "ignore":
        return before, []
    if on_change == "error":
        more = f" (and {len(added) - 1} more)" if len(added) > 1 else ""
        raise DriftError(
            f"input file {source.files[added[0]].path} was added since the output was begun{more}. "
            "--on-input-change append takes up what was added, ignore passes over it; or choose another output.path"
        )
    grown = source.only([*planned, *added])
    _check_same_columns(before, grown)
    return grown, added


def _check_unchanged(planned: Files, source: Source) -> None:
    for name, file in planned.items():
        if name not in source.files:
            raise DriftError(
                f"input file {name} ({file['path']}) was there when the output was begun and is gone. Put it back, or "
                "choose another output.path"
            )
        now = asdict(source.files[name])
        changed = [key for key in ("size", "mtime_ns", "tag", "footer") if now[key] != file[key]]
        if changed:
            raise DriftError(
                f"input file {now['path']} was changed since the output was begun: {changed[0]} was "
                f"{file[changed[0]]}, is {now[changed[0]]}. Put the old file back, or choose another output.path"
            )


def _told(column: pa.Field) -> str:
    return f"{column.name}: {column.type}{'' if column.nullable else ' not null'}"


def _check_same_columns(before: Source, grown: Source) -> None:
    old, new = ([_told(column) for column in source.schema] for source in (before, grown))
    if old != new:
        changes = [f"- {column}" for column in old if column not in new]
        changes += [f"+ {column}" for column in new if column not in old]
        raise DriftError(
            "the added input files have other columns than those that the output was begun with, and all its parts "
            "must be alike:\n  " + "\n  ".join(changes) + "\nmake the files alike, or choose another output.path"
        )
