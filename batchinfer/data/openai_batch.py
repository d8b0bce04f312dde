"""A job as lines of OpenAI's batch API, so that a hosted model or another engine can answer the same rows.

https://platform.openai.com/docs/api-reference/batch/request-input: one JSON object a line, in any order,
``{"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {"model": …, "messages": […], …}}``.
The way back is openai_results.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchinfer.data.columns import RowError, to_values
from batchinfer.data.prompt import RowPrompt, check_columns, unit_seeds
from batchinfer.data.row_sampling import RowSampling
from batchinfer.data.source import Source, Unit
from batchinfer.errors import InputError, OutputError
from batchinfer.job import Job
from batchinfer.request import SamplingParams

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # of one file, as the API documents them
MOST_ID = 64  # characters of a custom_id: OpenAI takes more, others that speak the format do not
READ_ROWS = 1024
SPOKEN = ("temperature", "top_p", "seed", "n")  # parameters that the API has under the same name


@dataclass
class Exported:
    """What was written, and what could not be."""

    files: list[Path]
    requests: int
    failed: int  # rows that no request could be made of
    unspoken: tuple[str, ...]  # sampling parameters of the job that the API has no word for

    @property
    def rows(self) -> int:
        return self.requests + self.failed


def export_requests(
    job: Job, target: str | os.PathLike[str], model: str, refused: Callable[[str, str], None]
) -> Exported:
    """Write a request line for each row, in the input's order: ``target``, and ``NAME-2.jsonl``, … beyond the limits.

    A job with ``prompt.chat = "off"`` asks /v1/completions, every other one /v1/chat/completions. Files get their names
    when all are written. Memory does not grow with the input.

    Args:
        model: the name that the service knows it by.
        refused: called with the custom_id of a row that cannot be asked, and why.

    Raises:
        InputError: the input cannot be used, or none of its rows can be asked.
        OutputError: a file cannot be written, or stands there already.
    """
    source = Source.of(job)
    columns = check_columns(job.prompt, job.sampling, source.schema)
    named = () if job.input.id_column is None else (job.input.id_column,)
    lines = _Lines(job, model)
    exported = Exported([], 0, 0, _unspoken(job))
    read = list(dict.fromkeys((*named, *columns))) or source.schema.names[:1]
    with _Files(Path(target)) as files, closing(source.read(source.units(READ_ROWS), read)) as units:
        for unit, rows in units:
            for custom_id, line in lines.of_unit(unit, rows):
                if isinstance(line, RowError):
                    exported.failed += 1
                    refused(custom_id, str(line))
                else:
                    exported.requests += 1
                    files.add(line)
        if not exported.requests:
            raise InputError(f"none of the {exported.rows:,} rows of the input can be asked; nothing was written")
    exported.files = files.paths
    return exported


def custom_ids(unit: Unit, rows: pa.Table | None, id_column: str | None) -> list[str]:
    """What the rows of a unit are called in a batch: ``FILE#ROW``, with an id column ``ID@FILE#ROW``.

    Unique, the same in every run, and at most ``MOST_ID`` characters: what is longer keeps the row's number and has
    the rest as a digest.
    """
    names: list[Any] = [None] * unit.rows
    if id_column is not None:
        assert rows is not None
        names = to_values(id_column, rows.column(id_column))
    places = ((file, row) for file, rows in unit.addresses(range(unit.rows)) for row in rows)
    return [_custom_id(file, row, name) for (file, row), name in zip(places, names)]


def _custom_id(file: str, row: int, name: Any) -> str:
    try:
        place = file if name is None else f"{name}@{file}"
    except RowError:  # a cell that cannot be read
        place = file
    if len(place) + len(f"#{row}") > MOST_ID:
        place = hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{place}#{row}"


class _Lines:
    """Rows as request lines."""

    def __init__(self, job: Job, model: str) -> None:
        self._prompt, self._sampling = RowPrompt(job.prompt), RowSampling(job.sampling)
        self._job, self._model, self._chat = job, model, job.prompt.chat != "off"

    def of_unit(self, unit: Unit, rows: pa.Table) -> Iterator[tuple[str, bytes | RowError]]:
        """The custom_id of each row with its line, or why there is none."""
        columns = dict.fromkeys((*self._prompt.columns, *self._sampling.columns))
        cells = {name: to_values(name, rows.column(name)) for name in columns}
        seeds = unit_seeds(self._job.sampling.seed, unit, range(unit.rows))
        params = self._sampling.of_rows(cells, seeds)
        for i, custom_id in enumerate(custom_ids(unit, rows, self._job.input.id_column)):
            try:
                yield custom_id, self._line(custom_id, {n: cells[n][i] for n in self._prompt.columns}, params[i])
            except RowError as error:
                yield custom_id, error

    def _line(self, custom_id: str, row: dict[str, Any], params: SamplingParams | RowError) -> bytes:
        asked = {"messages": self._prompt.messages(row)} if self._chat else {"prompt": self._prompt.text(row)}
        if isinstance(params, RowError):
            raise params
        body = {
            "model": self._model,
            **asked,
            # of a chat, max_tokens is deprecated: https://platform.openai.com/docs/api-reference/chat/create
            "max_completion_tokens" if self._chat else "max_tokens": params.max_tokens,
            **{name: getattr(params, name) for name in SPOKEN},
            **({"stop": list(params.stop)} if params.stop else {}),
        }
        url = "/v1/chat/completions" if self._chat else "/v1/completions"
        request = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
        try:
            line = json.dumps(request, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        except UnicodeEncodeError:
            raise RowError("the prompt is not valid Unicode: it holds a lone surrogate") from None
        except (TypeError, ValueError) as error:
            raise RowError(f"its messages cannot be written as JSON: {error}") from None
        if len(line) > MOST_BYTES:
            raise RowError(f"its request has {len(line):,} bytes, and a file of requests may have {MOST_BYTES:,}")
        return line


def _unspoken(job: Job) -> tuple[str, ...]:
    """Parameters that the job sets and a request cannot carry."""
    spoken = {*SPOKEN, "max_tokens", "stop"}
    params = job.sampling.params()
    set_ = {f.name for f in fields(SamplingParams) if getattr(params, f.name) != f.default} | set(job.sampling.columns)
    return tuple(name for name in SamplingParams.names() if name in set_ - spoken)


class _Files:
    """Files of lines within the API's limits. They get their names once all are written; after a failure none stays.

    Raises: OutputError if there are such files already: one left from an earlier export would be sent with the new.
    """

    def __init__(self, target: Path) -> None:
        self.paths: list[Path] = []
        self._target, self._file, self._requests, self._bytes = target, None, 0, 0
        own = re.compile(re.escape(target.stem) + r"(-\d+)?" + re.escape(target.suffix))
        try:
            taken = sorted(name for name in os.listdir(target.parent) if own.fullmatch(name))
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error.strerror}") from None
        if taken:
            raise OutputError(f"{target.parent / taken[0]} exists already; remove it or name another file")

    def __enter__(self) -> _Files:
        return self

    def add(self, line: bytes) -> None:
        full = self._requests >= MOST_REQUESTS or self._bytes + len(line) > MOST_BYTES
        try:
            if self._file is None or full:
                self._next()
            self._file.write(line)
        except OSError as error:
            raise OutputError(f"cannot write {self.paths[-1]}: {error.strerror}") from None
        self._requests += 1
        self._bytes += len(line)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for path in self.paths:
            os.replace(_unnamed(path), path) if kind is None else _unnamed(path).unlink(missing_ok=True)

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
        number = len(self.paths) + 1
        name = self._target.name if number == 1 else f"{self._target.stem}-{number}{self._target.suffix}"
        self.paths.append(self._target.with_name(name))
        self._file = open(_unnamed(self.paths[-1]), "wb")  # noqa: SIM115  (closed when it is full, or at the end)
        self._requests = self._bytes = 0


def _unnamed(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
