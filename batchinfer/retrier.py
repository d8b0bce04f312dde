"""A retry: rows of an output answered again, with other settings if need be, in the place of what they had."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.backends import open_backend
from batchinfer.cache import plain
from batchinfer.data.journal import ResultSchema
from batchinfer.data.ledger import Ledger
from batchinfer.data.look import look
from batchinfer.data.manifest import publish
from batchinfer.data.prompt import PromptRenderer, check_columns
from batchinfer.data.report import Summary, summarize, write_summary
from batchinfer.data.retries import Retry, Rows, choose, outcome
from batchinfer.data.series import Series
from batchinfer.data.source import Source
from batchinfer.data.superseding import Superseding
from batchinfer.data.threads import Deadline, Halt, StopNow, StopSignals
from batchinfer.deadline import ends_at
from batchinfer.errors import ExitCode, JobError
from batchinfer.job import Job
from batchinfer.runner import Columns, work
from batchinfer.words import counted

ENGINE = ("model", "engine", "build")
DECIDING = ("prompt", "sampling", *ENGINE)  # sections that may differ for the rows of a retry
OPERATIONAL = ("checkpoint", "limits", "report")
ANOTHER_ENGINE = "Name the new one with --set model.path=… (or engine.…), so that it is known which rows it answered"


def retry(
    job: Job | str | os.PathLike[str],
    where: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    progress: bool | None = None,
) -> Summary:
    """Answer some rows of an output again. Their results take the place of the old ones, a part at a time: whoever
    reads the output sees each row once, as it was or as it is.

    A row that fails again keeps the completion that it had. A retry that is interrupted is taken up again by the same
    ``where`` and ``overrides``; others begin a new one, and what the old one did stays.

    Args:
        job: a Job or a job file whose output is meant, or the output itself: then the job is the one it was begun with,
            without its deadline.
        where: SQL over one row of the output; those with an error unless given.
        overrides: dotted key → value, for these rows alone: [prompt], [sampling] but for ``n``, [model], [engine] and
            [build] are kept as what the rows were made with; [checkpoint], [limits] and [report] may differ too.
        progress: False for silence.

    Raises: what ``run`` raises. JobError if nothing was begun, or if ``where`` or ``overrides`` cannot serve.
    """
    begun = time.perf_counter()
    asked = _Asked.of(job, where, overrides or {})
    limits, halt = asked.job.limits, Halt()
    try:
        with (
            StopSignals(halt) as signals,
            Deadline(halt, ends_at(limits.deadline, limits.max_time)),
            Ledger(asked.job.output.path) as ledger,
        ):
            return _retry(asked, ledger, halt, signals, progress, begun)
    except StopNow:
        summary = summarize(look(asked.job.output.path), limits.max_failed_fraction)
        return dataclasses.replace(summary, state="stopped", exit_code=ExitCode.STOPPED, reason=halt.reason)


@dataclass(frozen=True)
class Chosen:
    """What a retry would answer again."""

    output: Path | str
    where: str
    rows: int
    parts: int
    of: int  # rows committed
    resumes: int | None  # the number of the interrupted retry that it would take up again

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output)}

    def __str__(self) -> str:
        again = f" (left of retry {self.resumes}, which was interrupted)" if self.resumes else ""
        return (
            f"{self.rows:,} of {counted(self.of, 'row')} in {counted(self.parts, 'part')} would be answered "
            f"again{again}: {self.where} · {self.output}"
        )


def dry_run(
    job: Job | str | os.PathLike[str], where: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Chosen:
    """What ``retry`` would do. Nothing is locked, loaded or written; raises what it raises."""
    asked = _Asked.of(job, where, overrides or {})
    ledger = look(asked.job.output.path)
    last = asked.interrupted(ledger)
    rows = {unit: last.rows[unit] for unit in last.pending(ledger.commits)} if last else choose(ledger, asked.where)
    committed = sum(commit.rows for commit in ledger.commits.values())
    count = sum(map(len, rows.values()))
    return Chosen(ledger.output, asked.where, count, len(rows), committed, last.number if last else None)


@dataclass(frozen=True)
class _Asked:
    base: Job  # the output's
    job: Job  # for the rows chosen
    where: str
    settings: dict[str, Any]  # what decides their completions and differs

    @classmethod
    def of(cls, job: Job | str | os.PathLike[str], where: str | None, overrides: Mapping[str, Any]) -> _Asked:
        if isinstance(job, (str, os.PathLike)):
            job = Job.load(job) if Path(job).suffix == ".toml" and not Path(job).is_dir() else _job_of(job)
        may = (*DECIDING, *OPERATIONAL)
        for key in overrides:
            if key.split(".")[0] not in may or key == "sampling.n":
                raise JobError(
                    f"a retry cannot set {key}: rows keep their address, their place and their columns. It may set the "
                    f"keys of [{'], ['.join(may)}], other than sampling.n"
                )
        settings = {key: value for key, value in overrides.items() if key.split(".")[0] in DECIDING}
        where = f'"{job.output.prefix}error" IS NOT NULL' if where is None else where
        return cls(job, job.changed(overrides), where, settings)

    def interrupted(self, ledger: Ledger) -> Retry | None:
        """The last retry, if it is this one and has rows left."""
        if not ledger.retries:
            return None
        last, semantic = ledger.retries[-1], plain(self.job.semantic())
        same = last.where == self.where and {**last.semantic, "engine": None} == {**semantic, "engine": None}
        return last if same and last.settings == self.settings and last.pending(ledger.commits) else None


def _job_of(output: str | os.PathLike[str]) -> Job:
    ledger = look(output)
    assert ledger.identity is not None
    here = {"output.path": str(ledger.output), "limits.deadline": None, "limits.max_time": None}
    return Job.from_dict(ledger.identity["job"]).changed(here)


def _retry(
    asked: _Asked, ledger: Ledger, halt: Halt, signals: StopSignals, progress: bool | None, begun: float
) -> Summary:
    job = asked.job
    if ledger.identity is None:
        raise JobError(f"no job was begun in {ledger.output}: expected its control folder at {ledger.store.root}")
    ledger.check_semantic(asked.base.semantic(), tuple(asked.base.semantic()))
    source = ledger.check_input(Source.of(asked.base), "ignore")
    results = ResultSchema(job.sampling.n)
    read = list(check_columns(job.prompt, job.sampling, source.schema)) or source.schema.names[:1]
    columns = Columns(read, results, Superseding(ledger, results, job.output.prefix))
    last = asked.interrupted(ledger)
    rows: Rows = last.rows if last else choose(ledger, asked.where)
    if not rows:
        _publish(ledger)
        return _told(summarize(ledger, job.limits.max_failed_fraction), ledger, asked, None)
    if halt.stopping:
        raise StopNow
    with ExitStack() as opened:
        backend = opened.enter_context(closing(open_backend(job, progress is not False)))
        engine = plain(backend.fingerprint)
        if not any(key.split(".")[0] in ENGINE for key in asked.settings):
            ledger.check_semantic({"engine": engine}, ("engine",), ANOTHER_ENGINE)
        semantic = {**plain(job.semantic()), "engine": engine}
        if last is None or last.semantic != semantic:
            last = Retry(len(ledger.retries) + 1, asked.where, asked.settings, semantic, rows)
        with Series(ledger) as series:
            renderer = PromptRenderer(job.prompt, job.sampling, backend.tokenizer_dir, backend.max_seq_len)
            ledger.begin_retry(last, source)
            summary = work(job, source, columns, ledger, renderer, backend, series, halt, signals, progress, begun)
            summary = _told(summary, ledger, asked, last)
            series.end(summary.as_dict())
        write_summary(ledger, summary)
        if not ledger.pending():
            _publish(ledger)
        return summary


def _publish(ledger: Ledger) -> None:
    if ledger.complete:
        publish(ledger)


def _told(summary: Summary, ledger: Ledger, asked: _Asked, made: Retry | None) -> Summary:
    """A summary that says what became of a retry's rows; its state and exit code are those of the retry."""
    if made is None:
        told = {"retry": None, "where": asked.where, "set": asked.settings, "rows": 0, "superseded": 0, "kept": 0}
        left = False
    else:
        told = outcome(ledger, made)
        left = bool(made.pending(ledger.commits))
    if left:
        return dataclasses.replace(summary, retry=told, state="stopped", exit_code=ExitCode.STOPPED)
    code = summary.exit_code if ledger.complete else ExitCode.OK
    return dataclasses.replace(summary, retry=told, state="complete", exit_code=code, reason="")
