"""Sampling parameters of each row: the job's, its own columns', its own seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as pat

from batchinfer.data.columns import RowError, Unreadable, find_column, is_text
from batchinfer.errors import InputError
from batchinfer.job import SamplingSection
from batchinfer.request import SamplingParams


class RowSampling:
    """Makes the SamplingParams of rows. A null cell takes the job's value; a bad one is an error of that row.

    Objects are shared wherever rows want the same: most rows of a job differ in their seed alone, and that counts only
    where tokens are drawn at random.
    """

    def __init__(self, section: SamplingSection):
        self._job = section.params()
        self._column_of = dict(section.columns)  # parameter → column
        self.columns = tuple(self._column_of.values())
        self._known: dict[tuple[Any, ...], SamplingParams] = {}

    def check(self, schema: pa.Schema) -> None:
        for name, column in self._column_of.items():
            kind = find_column(schema, column, f"sampling.columns.{name}")
            fits, wanted = _TYPES.get(name, (pat.is_integer, "whole numbers"))
            if not (fits(kind) or pat.is_null(kind)):
                raise InputError(f"sampling.columns.{name}: column {column!r} must hold {wanted}, found {kind}")

    def of_rows(self, cells: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> list[SamplingParams | RowError]:
        """The parameters of each row, or what is wrong with them. ``cells``: the ``columns`` as Python values."""
        if not self._column_of:
            return [_seeded(self._job, seed) for seed in seeds]
        own = zip(*(cells[column] for column in self.columns))
        return [self._of_row(values, seed) for values, seed in zip(own, seeds)]

    def _of_row(self, values: tuple[Any, ...], seed: int) -> SamplingParams | RowError:
        key = tuple(tuple(value) if isinstance(value, list) else value for value in values)
        wanted = {name: value for name, value in zip(self._column_of, key) if value is not None}
        own_seed = wanted.pop("seed", None)
        try:
            params = self._known.get(key)
            if params is None:
                if len(self._known) >= 4096:
                    self._known.clear()
                params = self._known[key] = self._validated(wanted)
            return _seeded(params, seed if own_seed is None else self._validated({"seed": own_seed}).seed)
        except RowError as error:
            return error

    def _validated(self, wanted: Mapping[str, Any]) -> SamplingParams:
        """The job's parameters with a row's own. One at a time, so that a bad value is told by its column."""
        params = self._job
        for name, value in wanted.items():
            where = f"column {self._column_of[name]!r}"
            if isinstance(value, Unreadable):
                raise value.error
            if name == "stop" and isinstance(value, str):
                value = (value,)
            if name == "stop_token_ids" and None in value:
                raise RowError(f"{where}: stop_token_ids must hold whole numbers, got a null among them")
            try:
                params = dataclasses.replace(params, **{name: value})
            except ValueError as error:
                told = str(error) if repr(value) in str(error) else f"{error}, got {value!r}"
                raise RowError(f"{where}: {told}") from None
        return params


def with_room(params: SamplingParams, room: int) -> SamplingParams:
    """The same parameters with at most ``room`` completion tokens."""
    return params if params.max_tokens <= room else _changed(params, max_tokens=room)


def _seeded(params: SamplingParams, seed: int) -> SamplingParams:
    """Greedy choice draws nothing, so all its rows share one object, whatever their seeds."""
    return params if params.temperature == 0 else _changed(params, seed=seed)


def _changed(params: SamplingParams, **changes: int) -> SamplingParams:
    """dataclasses.replace without its validation: these values are known to be good, and there is one a row."""
    new = object.__new__(SamplingParams)
    for name in _FIELDS:
        object.__setattr__(new, name, changes[name] if name in changes else getattr(params, name))
    return new


def _is_number(kind: pa.DataType) -> bool:
    return pat.is_floating(kind) or pat.is_integer(kind)


def _is_list_of(fits: Any) -> Any:
    return lambda kind: (pat.is_list(kind) or pat.is_large_list(kind)) and fits(kind.value_type)


_FIELDS = SamplingParams.names()
_TYPES = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (_is_number, "numbers")),
    "stop": (lambda kind: is_text(kind) or _is_list_of(is_text)(kind), "text or lists of text"),
    "stop_token_ids": (_is_list_of(pat.is_integer), "lists of whole numbers"),
    "ignore_eos": (pat.is_boolean, "true or false"),
}
