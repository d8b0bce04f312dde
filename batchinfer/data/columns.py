"""Input columns by name and type, and their values as Python objects."""

from __future__ import annotations

import difflib
from typing import Any

import pyarrow as pa
import pyarrow.types as pat

from batchinfer.errors import InputError


class RowError(Exception):
    """Why a row cannot be asked: a sentence for a person, without the row's text."""


class Unreadable:
    """Stands for a cell that Arrow holds and Python cannot: broken UTF-8, a timestamp out of range or in nanoseconds.

    It raises RowError where it would become text, so it costs nothing where it is not used.
    """

    def __init__(self, column: str, reason: str):
        self.error = RowError(f"column {column!r} {reason}")

    def __str__(self) -> str:
        raise self.error


def find_column(schema: pa.Schema, name: str, wanted_by: str, of: str = "the input") -> pa.DataType:
    """The type of the column's values. Raises InputError that names the nearest column and those there are."""
    at = schema.get_all_field_indices(name)
    if len(at) == 1:
        kind = schema.field(at[0]).type
        return kind.value_type if pat.is_dictionary(kind) else kind
    if at:
        raise InputError(f"{wanted_by} needs column {name!r}, and {of} has {len(at)} columns of that name")
    close = difflib.get_close_matches(name, schema.names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    shown = ", ".join(schema.names[:30]) + (", …" if len(schema.names) > 30 else "")
    raise InputError(f"{wanted_by} needs column {name!r}, which {of} lacks{hint} It has: {shown or 'no column'}")


def is_text(kind: pa.DataType) -> bool:
    return pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind)


def to_values(name: str, column: pa.ChunkedArray) -> list[Any]:
    """The column as Python values. A cell that cannot be one becomes Unreadable and leaves the others alone."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError and pyarrow.ArrowInvalid are ValueErrors
        return [_to_value(name, cell) for cell in column]


def _to_value(name: str, cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return Unreadable(name, "is not valid UTF-8")
    except (ValueError, OverflowError):
        return Unreadable(name, "holds a value that Python has no object for: out of range, or finer than microseconds")
