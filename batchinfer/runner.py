"""The run itself: source → prompts → backend → journal → sink."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from batchinfer.backends import Backend, open_backend
from batchinfer.backends.retries import with_retries
from batchinfer.data.feed import Feed
from batchinfer.data.journal import Journal, ResultSchema
from batchinfer.data.ledger import Ledger
from batchinfer.data.look import look
from batchinfer.data.manifest import publish
from batchinfer.data.metrics import exporters
from batchinfer.data.part_size import unit_rows
from batchinfer.data.prompt import PromptRenderer, check_columns
from batchinfer.data.report import Progress, Summary, summarize, write_summary
from batchinfer.data.series import Series
from batchinfer.data.sink import OutputSchema, Parts, Sink
from batchinfer.data.source import Source
from batchinfer.data.store import open_store
from batchinfer.data.threads import Deadline, Halt, StopNow, StopSignals
from batchinfer.deadline import ends_at
from batchinfer.engine.model.source import ModelSource
from batchinfer.errors import EngineError, ExitCode, JobDriftError, JobError, ModelError
from batchinfer.job import Job
from batchinfer.log import say
from batchinfer.shard import Shard


def run(
    job: Job | str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    progress: bool | None = None,
    fork: bool = False,
    shard: Shard | None = None,
) -> Summary:
    """Work through a job until every row of its input has a row in its output. Running it again resumes.

    SIGINT, SIGTERM and the job's deadline stop admission, let running rows finish and commit; a signal after that ends
    at once. Either way nothing finished is lost, and the summary's ``exit_code`` is 75. A job that is complete returns
    without loading the model.

    Args:
        job: a Job, or the path of a job file, which ``overrides`` (dotted key → value) apply to.
        progress: False for silence.
        fork: where the output was begun by another job, work in OUT-2 instead, or in OUT-3 if that one is another
            job's too, and so on. The summary's ``output`` says where.
        shard: the one that this run is, if not the job's ``job.shard``.

    Raises:
        JobError: the job, its input, model or output cannot be used.
        DriftError: job or input changed since the output was begun.
        LockedError: another run holds the output.
        IntegrityError: what lies on disk is not what was committed.
        EngineError: the engine failed; run again to go on.
    """
    begun = time.perf_counter()
    if isinstance(job, Job):
        if overrides:
            raise JobError("overrides apply to a job file; change a Job before it is run")
    else:
        job = Job.load(job, overrides)
    share = Shard.of(job.job.shard) if shard is None else shard
    halt, first, tried = Halt(), job.output.path.rstrip("/") or "/", 1
    end = ends_at(job.limits.deadline, job.limits.max_time)
    try:
        with StopSignals(halt) as signals, Deadline(halt, end), ExitStack() as opened:
            backend = functools.cache(lambda: opened.enter_context(closing(open_backend(job, progress is not False))))
            while True:
                try:
                    return _run(job, first, share, backend, halt, signals, progress, begun)
                except JobDriftError:
                    if not fork:
                        raise
                tried, taken = tried + 1, job.output.path
                job = job.model_copy(update={"output": job.output.model_copy(update={"path": f"{first}-{tried}"})})
                if progress is not False:
                    say(f"{taken} is another job's, this one goes to {job.output.path}", "warning")
    except StopNow:
        return _stopped_before_work(job, halt)


def _run(
    job: Job,
    first: str,
    shard: Shard | None,
    open_once: Callable[[], Backend],
    halt: Halt,
    signals: StopSignals,
    progress: bool | None,
    begun: float,
) -> Summary:
    """``run`` in one output. It, ``first`` and other forks of that do not count as input.

    Raises: JobDriftError if it is another job's, StopNow if nothing may be begun, else as ``run``.
    """
    source = Source.of(job, first)
    columns = _columns(job, source)
    with Ledger(job.output.path, shard=shard) as ledger:
        if ledger.identity is not None:
            ledger.check_semantic(job.semantic(), tuple(job.semantic()))
            source = ledger.check_input(source, job.input.on_change, unit_rows(job, source))
            columns = _columns(job, source)
        if ledger.identity is not None and not ledger.pending() and ledger.identity["model"] == _model_at_a_glance(job):
            if ledger.complete:
                publish(ledger)
            return summarize(ledger, job.limits.max_failed_fraction, seconds=time.perf_counter() - begun)
        if halt.stopping:
            raise StopNow
        listeners = exporters(job)
        backend = open_once()
        with Series(ledger, listeners) as series:
            renderer = PromptRenderer(job.prompt, job.sampling, backend.tokenizer_dir, backend.max_seq_len)
            told = job.model_dump(mode="json", exclude={"job": {"shard"}})
            ledger.begin(
                source,
                unit_rows(job, source),
                semantic={**job.semantic(), "engine": backend.fingerprint},
                operational={"model": _model_at_a_glance(job), "job": told},
            )
            summary = work(job, source, columns, ledger, renderer, backend, series, halt, signals, progress, begun)
            series.end(summary.as_dict())
        write_summary(ledger, summary)
        if ledger.complete:
            publish(ledger)
        return summary


def _stopped_before_work(job: Job, halt: Halt) -> Summary:
    try:
        summary = summarize(look(job.output.path), job.limits.max_failed_fraction)
    except JobError:  # not begun either
        summary = Summary(open_store(job.output.path).root, "stopped", ExitCode.STOPPED)
    return dataclasses.replace(summary, state="stopped", exit_code=ExitCode.STOPPED, reason=halt.reason)


@dataclass(frozen=True)
class Columns:
    """What is read of the input, what comes back, and what parts are made of."""

    read: list[str]
    results: ResultSchema
    parts: Parts


def _columns(job: Job, source: Source) -> Columns:
    """Wrong names end the run before it begins."""
    results = ResultSchema(job.sampling.n)
    output = OutputSchema(job.output, source.schema, results, job.input.id_column)
    asked = check_columns(job.prompt, job.sampling, source.schema)
    read = list(dict.fromkeys((*output.carried, *asked))) or source.schema.names[:1]
    return Columns(read, results, output)


def work(
    job: Job,
    source: Source,
    columns: Columns,
    ledger: Ledger,
    renderer: PromptRenderer,
    backend: Backend,
    series: Series,
    halt: Halt,
    signals: StopSignals,
    progress: bool | None,
    begun: float,
) -> Summary:
    """Compute what is pending in a ledger, or as much as ``halt`` allows.

    Args:
        begun: when the run was, by ``time.perf_counter``.
    """
    opened = time.perf_counter() - begun
    seconds, count = ledger.store.sync_gap
    sync = (
        seconds if job.checkpoint.sync_seconds is None else job.checkpoint.sync_seconds,
        job.checkpoint.sync_rows or count,
    )
    footer = {"batchinfer.job": job.job.name, "batchinfer.model": job.model.name}
    sink = Sink(ledger, columns.parts, job.output.compression, footer, lambda unit: feed.committed(unit), halt)
    pending, retry = ledger.pending(), ledger.retry
    journal = Journal(
        ledger.store, ledger.epoch, columns.results, sync, sink.put, halt, retry=retry.number if retry else 0
    )
    chunks = ledger.shard.chunks(ledger, backend.load, halt) if ledger.shard else [pending]
    feed = Feed(source, chunks, columns.read, renderer, job.sampling.seed, journal, halt)
    rows = sum(unit.rows for unit in ledger.share)
    before = rows - sum(unit.rows for unit in pending)
    settled = sum(commit.rows for commit in ledger.commits.values())

    def done() -> int:
        return before + journal.recovered + journal.tally.rows

    told = Progress(rows, done, journal.tally, backend.load, job.report.log_seconds, progress)
    series.begin(job, (lambda: settled) if retry else done, journal.tally, backend.load)
    started = generated = time.perf_counter()
    try:
        with sink, journal, feed, told:
            signals.phase = "work"
            try:
                for completion in with_retries(backend, feed.requests(), job.limits.retries):
                    feed.outstanding -= 1
                    journal.add(completion)
                    if halt.error is not None:
                        break
            finally:
                signals.phase = "end"
                generated = time.perf_counter()
    except StopNow:
        halt.stopping = True
    for error in (halt.error, feed.error):
        if error is not None:
            raise error
    ledger.gather()
    known = {unit.index for unit in pending}  # what another shard appended meanwhile is for the next run
    if not halt.stopping and any(unit.index in known for unit in ledger.pending()):
        raise EngineError(f"the engine ended with {feed.outstanding} requests unanswered; run again to go on")
    return summarize(
        ledger,
        job.limits.max_failed_fraction,
        run=journal.tally,
        logged=journal.logged(ledger.pending()),
        seconds=time.perf_counter() - begun,
        load=backend.load(),
        stages={
            "open": opened,
            "generate": generated - started,
            "generate.wait": feed.waited,
            **feed.seconds,
            **journal.seconds,
            **sink.seconds,
        },
        reason=halt.reason,
    )


def _model_at_a_glance(job: Job) -> dict[str, Any]:
    """Whether the model may have changed, told without opening it. Equal: it has not. Else its fingerprint decides."""
    try:
        files = ModelSource.resolve(job.model.path).stat_digest()
    except (ModelError, OSError):
        files = None
    own = {"tensorrt"} if job.engine.backend == "tensorrt-llm" else set()
    asked = job.engine.model_dump(include={"backend", "plan", "device", "dtype", *own})
    return {"path": job.model.path, "files": files, **asked}
