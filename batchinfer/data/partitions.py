"""Hive partitions: what folders named ``key=value`` say of the rows in them.

They are columns for templates and filters. Parts lie in folders of the same names, which say it there: no part repeats
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

NULL = "__HIVE_DEFAULT_PARTITION__"
_MARK = {"batchinfer.partition": "1"}
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # 007 is a name, and 7 would not lead back to its folder


def is_partition(field: pa.Field) -> bool:
    """Whether a column of a source is told by folders."""
    return field.metadata is not None and b"batchinfer.partition" in field.metadata


def partition_fields(files: Iterable[str]) -> list[pa.Field]:
    """The columns that the folders of files tell: whole numbers if all values of a key are, else text."""
    values: dict[str, set[str]] = {}
    for folders in {file.rpartition("/")[0] for file in files}:
        for key, value in _told(folders).items():
            values.setdefault(key, set()).update(() if value is None else (value,))
    numbers = {key for key, told in values.items() if told and all(_WHOLE_NUMBER.fullmatch(value) for value in told)}
    return [pa.field(key, pa.int64() if key in numbers else pa.string(), metadata=_MARK) for key in values]


def partition_value(file: str, field: pa.Field) -> Any:
    """What a file's folders say of a column; None where they say nothing."""
    value = _told(file.rpartition("/")[0]).get(field.name)
    return int(value) if value is not None and pa.types.is_integer(field.type) else value


def _told(folders: str) -> dict[str, str | None]:
    pairs = (folder.partition("=") for folder in folders.split("/"))
    return {unquote(key): None if value == NULL else unquote(value) for key, equals, value in pairs if key and equals}
