"""Survey: everything a report shows, read from an output a part at a time."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.columns import RowError, to_values
from batchinfer.data.commits import Commit
from batchinfer.data.estimate import PREDICTION
from batchinfer.data.journal import Tally
from batchinfer.data.ledger import Ledger
from batchinfer.data.prompt import prompt_columns
from batchinfer.data.report import SUMMARY, summarize
from batchinfer.data.series import RunSeries, read_runs
from batchinfer.data.source import Unit
from batchinfer.data.standing import standing
from batchinfer.data.stats import OTHER, Lengths, failures
from batchinfer.errors import DriftError
from batchinfer.job import PromptSection

MOST_KINDS = 1000  # of failure, told apart
SHOWN = 600  # characters of a sampled text


@dataclass
class Failures:
    """Failed rows of one kind."""

    count: int = 0
    rows: list[str] = field(default_factory=list)  # addresses file:row of the first few


@dataclass(frozen=True)
class Sample:
    """A row as it came out. Texts are cut to ``SHOWN`` characters."""

    address: str
    asked: dict[str, str]  # column → its text
    completions: list[str]
    finish_reasons: list[str]
    prompt_tokens: int | None
    completion_tokens: int


@dataclass
class Survey:
    """What an output is, holds and was made by."""

    output: Path | str
    state: str  # complete | running | unfinished
    rows: int
    job: Tally  # all that is committed
    identity: dict[str, Any]  # job.json
    runs: list[RunSeries]
    summary: dict[str, Any]  # of the last run; empty if it has not ended
    prediction: dict[str, Any] | None
    prompt: Lengths = field(default_factory=Lengths)
    completion: Lengths = field(default_factory=Lengths)
    failures: dict[str, Failures] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    unread: int = 0  # committed parts that could not be read
    time: float = field(default_factory=time.time)

    @property
    def seconds(self) -> float:
        """Time of all runs so far, opening the engine left out."""
        return sum(run.seconds for run in self.runs)

    @property
    def done(self) -> int:
        """Rows that need no more work, as far as a running or dead run told."""
        told = int(self.runs[-1].points["rows"][-1]) if self.runs and len(self.runs[-1].points["rows"]) else 0
        return max(self.job.rows, told)

    @property
    def seconds_left(self) -> float | None:
        """Of work, at the pace of the last run; None if that cannot be told."""
        if self.state == "complete" or not self.runs or not self.runs[-1].seconds:
            return None
        last = self.runs[-1]
        pace = last.points["computed"][-1] / last.seconds
        return (self.rows - self.done) / pace if pace > 0 else None

    def peak(self, name: str) -> float | None:
        """The highest value of a series over all runs."""
        values = [run.points[name].max() for run in self.runs if len(run.points[name])]
        return float(max(values)) if values else None


def survey(output: str, samples: int = 6) -> Survey:
    """Read what a report needs of an output, finished, running or dead. Memory does not grow with the rows.

    Args:
        samples: rows to show, spread over the parts; the same ones each time.

    Raises:
        JobError: no job was begun there.
        IntegrityError: a control file is damaged.
    """
    stands = standing(output)
    ledger = stands.ledger
    found = Survey(
        output=ledger.output,
        state=stands.state,
        rows=ledger.rows,
        job=summarize(ledger, max_failed_fraction=1.0).job,
        identity=ledger.identity or {},
        runs=read_runs(ledger.store),
        summary=_read_json(ledger, SUMMARY) or {},
        prediction=_read_json(ledger, PREDICTION),
    )
    prefix = found.identity["job"]["output"]["prefix"]
    commits = [ledger.commits[index] for index in sorted(ledger.commits)]
    for commit in commits:
        try:
            _count(ledger, commit, prefix, found)
        except (OSError, DriftError, pa.ArrowException):  # on its way into OUT, or damaged, which `verify` tells
            found.unread += 1
    found.samples = list(_samples(ledger, commits, prefix, found.identity["job"], samples))
    return found


def _count(ledger: Ledger, commit: Commit, prefix: str, found: Survey) -> None:
    why = ("error", "finish_reason") if commit.failed else ()
    names = [prefix + name for name in ("prompt_tokens", "completion_tokens", *why)]
    row = 0
    with pq.ParquetFile(ledger.parts.open(commit.part)) as part:
        for batch in part.iter_batches(65_536, columns=names):
            found.prompt.add(_numbers(batch[names[0]]))
            found.completion.add(_numbers(batch[names[1]]))
            if commit.failed:
                _count_failures(batch, prefix, ledger.units[commit.unit], row, found)
            row += batch.num_rows


def _count_failures(batch: pa.RecordBatch, prefix: str, unit: Unit, first_row: int, found: Survey) -> None:
    for row, kind in failures(batch, prefix):
        if kind not in found.failures and len(found.failures) >= MOST_KINDS:
            kind = OTHER
        told = found.failures.setdefault(kind, Failures())
        told.count += 1
        if len(told.rows) < 3:
            told.rows.append(_address(unit, first_row + row))


def _samples(ledger: Ledger, commits: list[Commit], prefix: str, job: dict[str, Any], count: int) -> Iterator[Sample]:
    good = [commit for commit in commits if commit.failed < commit.rows]
    asked = prompt_columns(PromptSection.model_validate(job["prompt"]))
    draw = random.Random(0)
    for commit, wanted in sorted(Counter(i * len(good) // count for i in range(count if good else 0)).items()):
        commit = good[commit]
        try:
            with pq.ParquetFile(ledger.parts.open(commit.part)) as part:
                carried = [name for name in asked if name in part.schema_arrow.names]
                names = [prefix + n for n in ("completion", "finish_reason", "prompt_tokens", "completion_tokens")]
                answered = np.flatnonzero(part.read([names[0]])[names[0]].is_valid().to_numpy())
                rows = sorted(draw.sample(answered.tolist(), min(wanted, len(answered))))
                table = part.read([*carried, *names])
        except (OSError, DriftError, pa.ArrowException):
            continue
        for row in rows:
            cells = {name: to_values(name, table[name].slice(row, 1))[0] for name in (*carried, *names)}
            texts, reasons, tokens_in, tokens_out = (cells[name] for name in names)
            yield Sample(
                _address(ledger.units[commit.unit], row),
                {name: _shown(cells[name]) for name in carried},
                [_shown(text) for text in _listed(texts)],
                _listed(reasons),
                tokens_in,
                sum(_listed(tokens_out)),
            )


def _address(unit: Unit, row: int) -> str:
    [(file, [number])] = unit.addresses([row])
    return f"{file}:{number}"


def _numbers(column: pa.Array) -> np.ndarray:
    """What is there of whole numbers, or of lists of them."""
    if pa.types.is_list(column.type):
        column = column.flatten()
    return column.drop_null().to_numpy(zero_copy_only=False)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shown(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except RowError as error:
        return f"({error})"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _read_json(ledger: Ledger, name: str) -> Any:
    """A file that is there for people: without it, or with a damaged one, there is less to show."""
    try:
        return json.loads(ledger.store.read(name))
    except (FileNotFoundError, ValueError):
        return None
