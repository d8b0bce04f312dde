"""RowFilter: a condition in SQL over the columns of a row. The one place of the data plane that needs polars."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from batchinfer.data.columns import Unreadable, find_column, to_values
from batchinfer.errors import InputError, JobError

if TYPE_CHECKING:
    import polars as pl

# What polars calls the parts of an expression that look at other rows; how a file is cut must not decide about a row.
_BEYOND_THE_ROW = re.compile(r'"(Agg|Over|Window|Rolling|Len|Range|Explode|Rank|Correlation|Quantile|Selector)"')


class RowFilter:
    """A condition as in ``WHERE``: a row for which it is null is not taken. A cell of broken UTF-8 counts as null.

    polars parses and evaluates it, since Arrow has no SQL. It is asked while units are planned or a retry chooses its
    rows, and the plan keeps what it said: rows on their way to the engine never pass through polars, and a resumed run
    does not ask it again.

    Args:
        schema: all columns that it may use.
        key: what the condition is called where it was given.
        of: whose columns they are.

    Raises:
        JobError: it is not SQL that polars knows, or not a condition on one row.
        InputError: it names a column that the input lacks.
    """

    def __init__(self, sql: str, schema: pa.Schema, key: str = "input.filter", of: str = "the input") -> None:
        import polars as pl

        self._sql, self._key = sql, key
        try:
            self._condition = pl.sql_expr(sql)
            told = self._condition.meta.serialize(format="json")
        except Exception as error:  # whatever the parser raises
            raise self._refused(f"is not a condition in SQL: {error}") from None
        if found := _BEYOND_THE_ROW.search(told):
            raise self._refused(f"must look at one row alone, and it looks at several ({found[1]})")
        self.columns = tuple(dict.fromkeys(self._condition.meta.root_names()))
        for name in self.columns:
            find_column(schema, name, key, of)
        if not self.columns:
            raise self._refused("names no column, so it says the same of each row")
        try:
            answer = self._answer(pa.table({name: pa.nulls(2, schema.field(name).type) for name in self.columns}))
        except (Exception, pl.exceptions.PanicException) as error:
            raise self._refused(f"does not fit the columns: {error}") from None
        if answer.dtype not in (pl.Boolean, pl.Null) or len(answer) != 2:
            raise self._refused(f"must be true or false for each row, and it is {answer.dtype}")

    def mask(self, rows: pa.Table, where: str) -> np.ndarray:
        """Whether each row is taken, bool [rows]. Raises: InputError naming ``where`` if polars refuses a value."""
        import polars as pl

        try:
            answer = self._answer(pa.table({name: _sound(name, rows.column(name)) for name in self.columns}))
        except (Exception, pl.exceptions.PanicException) as error:
            raise InputError(f"{self._key} fails on rows of {where}: {_short(error)}") from None
        return answer.cast(pl.Boolean).fill_null(False).to_numpy()

    def _answer(self, rows: pa.Table) -> pl.Series:
        import polars as pl

        return pl.DataFrame(rows).select(self._condition).to_series()

    def _refused(self, why: str) -> JobError:
        example = "lang = 'en' AND length(text) > 20"
        return JobError(f"{self._key} {_short(why)}. Found {self._sql!r}; expected for example {example!r}")


def _sound(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column without text that polars would take for valid and stumble over."""
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        values = (None if isinstance(value, Unreadable) else value for value in to_values(name, column))
        return pa.chunked_array([pa.array(list(values), column.type)])


def _short(told: object) -> str:
    text = " ".join(str(told).split())
    return text if len(text) <= 300 else f"{text[:300]}…"
