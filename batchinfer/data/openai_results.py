"""Results of OpenAI's batch API as an output of the job that they answer: the way back of openai_batch.py.

https://platform.openai.com/docs/api-reference/batch/request-output: one JSON object a line, in any order, over an
output file and an error file for each batch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchinfer.data import manifest
from batchinfer.data.columns import RowError
from batchinfer.data.feed import IN_FLIGHT
from batchinfer.data.journal import FinishedUnit, ResultSchema, Tally
from batchinfer.data.ledger import Ledger
from batchinfer.data.openai_batch import custom_ids
from batchinfer.data.part_size import unit_rows
from batchinfer.data.report import Summary, summarize, write_summary
from batchinfer.data.sink import OutputSchema, Sink
from batchinfer.data.source import Source, Unit
from batchinfer.data.threads import Halt, Window
from batchinfer.errors import InputError
from batchinfer.job import Job


def import_results(job: Job, paths: Sequence[str]) -> Summary:
    """Make an output of ``job`` from result and error lines: same columns, order and control files as a run makes.

    A row without a line becomes a row with an error. Killed, it goes on where it was when called again with the same
    files. Holds the place of each line in memory, never the lines.

    Raises:
        InputError: a line is no result, two lines answer one row, or a line answers no row of the input.
        DriftError: the output was begun by something else, another job, other results, or a run.
    """
    begun = time.perf_counter()
    source = Source.of(job)
    columns = OutputSchema(job.output, source.schema, ResultSchema(job.sampling.n), job.input.id_column)
    with Results(paths) as results, Ledger(job.output.path) as ledger:
        if ledger.identity is not None:
            source = ledger.check_input(source, job.input.on_change, unit_rows(job, source))
        _check_known(results, source, ledger.units or source.units(unit_rows(job, source)), job.input.id_column)
        model = ", ".join(sorted(results.models)[:3])
        ledger.begin(
            source,
            unit_rows(job, source),
            semantic={**job.semantic(), "engine": {"engine": "openai-batch", "results": results.digest}},
            operational={"model": {"path": model, "files": None, "imported": True}, "job": job.model_dump(mode="json")},
        )
        made = _make(job, source, columns, ledger, results, model)
        seconds = time.perf_counter() - begun
        summary = summarize(ledger, job.limits.max_failed_fraction, run=made, seconds=seconds)
        write_summary(ledger, summary)
        manifest.publish(ledger)
        return summary


def _make(job: Job, source: Source, columns: OutputSchema, ledger: Ledger, results: Results, model: str) -> Tally:
    """Write and commit the units that are missing."""
    halt, tally, schema = Halt(), Tally(), ResultSchema(job.sampling.n)
    window = Window(*IN_FLIGHT, halt)

    def committed(finished: FinishedUnit) -> None:
        window.leave(finished.unit.rows, finished.carried.nbytes)

    footer = {"batchinfer.job": job.job.name, "batchinfer.model": model}
    named = () if job.input.id_column is None else (job.input.id_column,)
    read = list(dict.fromkeys((*columns.carried, *named))) or source.schema.names[:1]
    with (
        Sink(ledger, columns, job.output.compression, footer, committed, halt) as sink,
        closing(source.read(ledger.pending(), read)) as units,
    ):
        for unit, carried in units:
            if not window.enter(unit.rows, carried.nbytes):
                break
            ids = custom_ids(unit, carried, job.input.id_column)
            answers = [_answer(results.find(custom_id), custom_id, job.sampling.n) for custom_id in ids]
            table = pa.Table.from_pylist(answers, schema.columns)
            tally.add(table)
            sink.put(FinishedUnit(unit, carried, table, []))
    halt.check()
    return tally


def _check_known(results: Results, source: Source, units: list[Unit], id_column: str | None) -> None:
    """Raises: InputError if a result is of no row. Rows have different ids, so that it is enough to count."""
    if sum(custom_id in results for custom_id in _all_ids(source, units, id_column)) == len(results):
        return
    unknown = set(results).difference(_all_ids(source, units, id_column))
    first = min(unknown, key=results.place)
    raise InputError(
        f"{results.where(first)}: no row of the input has the custom_id {first!r}"
        + (f" (nor those of {len(unknown) - 1:,} other lines)" if len(unknown) > 1 else "")
        + ". Import with the job that the requests were exported with, over the same input"
    )


def _all_ids(source: Source, units: list[Unit], id_column: str | None) -> Iterator[str]:
    if id_column is None:
        for unit in units:
            yield from custom_ids(unit, None, None)
        return
    with closing(source.read(units, [id_column])) as read:
        for unit, rows in read:
            yield from custom_ids(unit, rows, id_column)


class Results:
    """Lines of result and error files, found by custom_id.

    Attributes:
        digest: of the files' contents, whatever their names and order.
        models: the names by which the service calls who answered.

    Raises:
        InputError: a file cannot be read, or a line is not a JSON object with a custom_id of its own.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.models: set[str] = set()
        self._paths = [Path(path) for path in paths]
        self._places: dict[str, tuple[int, int]] = {}  # custom_id → which file, and the line's first byte

    def __enter__(self) -> Results:
        with ExitStack() as opened:
            try:
                self._files = [opened.enter_context(open(path, "rb")) for path in self._paths]
                digests = [self._index(file) for file in range(len(self._files))]
            except OSError as error:
                raise InputError(f"cannot read {error.filename or 'the results'}: {error.strerror}") from None
            self.digest = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, custom_id: object) -> bool:
        return custom_id in self._places

    def place(self, custom_id: str) -> tuple[int, int]:
        return self._places[custom_id]

    def where(self, custom_id: str) -> str:
        """For people: file and line."""
        file, begin = self._places[custom_id]
        stream = self._files[file]
        stream.seek(0)
        number = next(number for number, line in enumerate(stream, 1) if (begin := begin - len(line)) < 0)
        return f"{self._paths[file]}, line {number}"

    def find(self, custom_id: str) -> dict[str, Any] | None:
        """The line of a row; None if there is none."""
        if custom_id not in self._places:
            return None
        file, begin = self._places[custom_id]
        self._files[file].seek(begin)
        return json.loads(self._files[file].readline())

    def _index(self, file: int) -> str:
        digest, begin = hashlib.sha256(), 0
        for number, line in enumerate(self._files[file], 1):
            digest.update(line)
            if not line.isspace():
                self._note(line, (file, begin), f"{self._paths[file]}, line {number}")
            begin += len(line)
        return digest.hexdigest()

    def _note(self, line: bytes, place: tuple[int, int], where: str) -> None:
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: expected a JSON object, found {line[:60]!r}") from None
        custom_id = result.get("custom_id") if isinstance(result, dict) else None
        if not isinstance(custom_id, str):
            raise InputError(f'{where}: expected a result line with a "custom_id", found {line[:60]!r}')
        if "response" not in result and "error" not in result:
            raise InputError(f"{where}: expected a result with a response or an error, found none; is it a request?")
        if custom_id in self._places:
            raise InputError(
                f"{where}: custom_id {custom_id!r} is answered at {self.where(custom_id)} already; keep one of the two"
            )
        self._places[custom_id] = place
        model = _at(result, "response", "body", "model")
        if isinstance(model, str):
            self.models.add(model)


def _answer(result: dict[str, Any] | None, custom_id: str, n: int) -> dict[str, Any]:
    """The result columns of a row, from its line."""
    body = _at(result, "response", "body")
    row = {"prompt_tokens": _count(body, "prompt_tokens"), "completion_tokens": None}
    try:
        choices = _choices(result, custom_id, n)
    except RowError as error:
        return {**row, "completion": None, "finish_reason": "error" if n == 1 else ["error"], "error": str(error)}
    errors = [error for _, _, error in choices if error]
    row["error"] = errors[0] if errors else None
    texts, reasons = ([choice[at] for choice in choices] for at in (0, 1))
    if n == 1:
        counted = _count(body, "completion_tokens")
        return {**row, "completion": texts[0], "finish_reason": reasons[0], "completion_tokens": counted}
    # the API counts the tokens of all choices together
    return {**row, "completion": texts, "finish_reason": reasons, "completion_tokens": [None] * n}


def _choices(result: dict[str, Any] | None, custom_id: str, n: int) -> list[tuple[str | None, str, str | None]]:
    """Text, finish reason and error of each completion. Raises RowError if there are none."""
    if result is None:
        raise RowError(f"no result: none of the files imported has a line for {custom_id}")
    told = result.get("error") or _at(result, "response", "body", "error")
    if told:
        raise RowError(_text(f"{_at(told, 'code') or 'error'}: {_at(told, 'message') or told}"))
    status, choices = _at(result, "response", "status_code"), _at(result, "response", "body", "choices")
    if status not in (None, 200) or not isinstance(choices, list) or not choices:
        raise RowError(f"the result has no completion (status code {status})")
    if len(choices) != n:
        raise RowError(f"the result has {len(choices)} completions, and sampling.n is {n}")
    return [_choice(choice) for choice in sorted(choices, key=lambda c: _at(c, "index") or 0)]


def _choice(choice: Any) -> tuple[str | None, str, str | None]:
    said = next((t for t in (_at(choice, "message", "content"), _at(choice, "text")) if isinstance(t, str)), None)
    text, reason = None if said is None else _text(said), _at(choice, "finish_reason")
    if refusal := _at(choice, "message", "refusal"):
        return text, "error", _text(f"the model refused: {refusal}")
    if reason not in ("stop", "length"):
        return text, "error", _text(f"the service ended the completion for another reason: {reason}")
    return (text, reason, None) if text is not None else (None, "error", "the result has no text")


def _count(body: Any, name: str) -> int | None:
    count = _at(body, "usage", name)
    return count if isinstance(count, int) and 0 <= count < 2**31 else None


def _at(tree: Any, *keys: str) -> Any:
    """What lies at a path of keys; None where there is no such thing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _text(text: str) -> str:
    """JSON can spell a lone surrogate; UTF-8, and so Parquet, cannot."""
    return text.encode("utf-8", "replace").decode()
