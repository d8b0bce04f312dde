"""What a run tells: progress while it goes, a summary when it ends, a look at its first rows."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data import commits
from batchinfer.data.journal import Tally
from batchinfer.data.ledger import Commit, Ledger
from batchinfer.data.source import Unit
from batchinfer.errors import ExitCode
from batchinfer.host import peak_rss
from batchinfer.log import is_json, say
from batchinfer.request import Load
from batchinfer.words import clock, counted

SUMMARY = "summary.json"
SHARDS = "shards"
BAR = "{percentage:3.0f}%|{bar}| {n:,}/{total:,} rows, {remaining} left{postfix}"  # what is before and behind has room


@dataclass(frozen=True)
class Summary:
    """How a run ended. ``job`` counts everything committed so far, ``run`` what this run computed.

    That of a shard is about its own share of the rows, and ``whole`` about all of them.

    ``logged`` rows are finished, but not all of their unit is, so that they are not in the output yet.
    """

    output: Path | str
    state: Literal["complete", "stopped"]
    exit_code: ExitCode
    rows: int = 0  # of the whole job, or of the shard
    job: Tally = field(default_factory=Tally)
    run: Tally = field(default_factory=Tally)
    logged: int = 0
    seconds: float = 0.0  # wall time of this run, engine loading included
    load: Load | None = None  # the engine's own counters; None if it was not needed
    stages: dict[str, float] = field(default_factory=dict)  # seconds by stage; threads overlap
    peak_rss: int = 0  # bytes, of this process and of the engine's together
    reason: str = ""  # why it stopped early
    shard: str = ""  # "0/4", if it is one's
    whole: Summary | None = None
    retry: dict[str, Any] | None = None  # of a retry: what it was, and what became of the rows it chose

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """Over the time in which the engine generated."""
        seconds = self.stages.get("generate") or self.seconds or 1.0
        prompt, completion = self.run.prompt_tokens / seconds, self.run.completion_tokens / seconds
        return {"prompt": prompt, "completion": completion, "total": prompt + completion}

    def as_dict(self) -> dict[str, Any]:
        rates = {name: round(rate, 1) for name, rate in self.tokens_per_second.items()}
        of_shard = {"shard": self.shard, "whole": self.whole.standing()} if self.whole else {}
        return {
            "output": str(self.output),
            **of_shard,
            "state": self.state,
            "exit_code": int(self.exit_code),
            "reason": self.reason,
            "total_rows": self.rows,
            "logged_rows": self.logged,
            "job": _counts(self.job),
            "run": _counts(self.run) | {"seconds": round(self.seconds, 3), "tokens_per_second": rates},
            "stages": {name: round(seconds, 3) for name, seconds in self.stages.items()},
            "peak_rss_bytes": self.peak_rss,
            "load": asdict(self.load) if self.load else None,
            **({"retry": self.retry} if self.retry else {}),
        }

    def standing(self) -> dict[str, Any]:
        """What there is, whoever did it."""
        return {"state": self.state, "total_rows": self.rows, "job": _counts(self.job)}

    def __str__(self) -> str:
        if self.retry:
            return f"{_of_retry(self.retry)} · {dataclasses.replace(self, retry=None)}"
        done = counted(self.job.rows, "row")
        if self.state == "stopped":
            done = f"{self.job.rows + self.logged:,} of {counted(self.rows, 'row')}"
        parts = [f"{f'shard {self.shard}: ' * bool(self.shard)}{done}{self.job.losses}"]
        counts = self.job if self.state == "complete" else self.run
        parts.append(f"{counts.prompt_tokens:,} tokens in, {counts.completion_tokens:,} out")
        if self.run.rows:
            parts.append(f"{self.tokens_per_second['total']:,.0f} tok/s")
            parts.append(f"{clock(self.seconds)} wall")
        elif self.state == "complete":
            parts.append("nothing left to do")
        if self.load and (told := mishaps(self.load.details)):
            parts.append(told)
        if self.state == "stopped":
            why = f" ({self.reason})" if self.reason else ""
            parts.append(f"stopped early{why}, run again to go on")
        if self.whole:
            parts.append(f"{self.whole.job.rows:,} of the job's {self.whole.rows:,} rows are in")
        return " · ".join([*parts, str(self.output)])


def _of_retry(told: dict[str, Any]) -> str:
    if not told["rows"]:
        return f"no row to retry, none has {told['where']}"
    kept = f", {told['kept']:,} failed and kept what they had" if told["kept"] else ""
    return f"retry {told['retry']}: {told['superseded']:,} of {counted(told['rows'], 'row')} superseded{kept}"


def mishaps(details: dict[str, Any]) -> str:
    """What an engine's process went through, of a Load's details; nothing if all went well."""
    restarts, aside = details.get("restarts", 0), details.get("quarantined", 0)
    times = f"engine restarted {counted(restarts, 'time')}" if restarts else ""
    return times + (f", {counted(aside, 'row')} set aside" if aside else "")


def _counts(tally: Tally) -> dict[str, Any]:
    return {
        "rows": tally.rows,
        "ok": tally.rows - tally.failed - tally.skipped,
        "failed": tally.failed,
        "skipped": tally.skipped,
        "finish_reasons": dict(tally.finish_reasons),
        "failures": dict(tally.failures.most_common()),
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
    }


def summarize(
    ledger: Ledger,
    max_failed_fraction: float,
    *,
    run: Tally | None = None,
    logged: int = 0,
    seconds: float = 0.0,
    load: Load | None = None,
    stages: dict[str, float] | None = None,
    reason: str = "",
) -> Summary:
    """The summary of a ledger as it stands. ``reason``: why the run stopped, if it did not complete."""
    job = _committed(ledger, ledger.share)
    complete = ledger.identity is not None and not ledger.pending()
    code = ExitCode.OK if complete else ExitCode.STOPPED
    if complete and job.failed > max_failed_fraction * job.rows:
        code = ExitCode.FAILED_ROWS
    whole = None
    if ledger.shard is not None:
        state, exit_code = ("complete", ExitCode.OK) if ledger.complete else ("stopped", ExitCode.STOPPED)
        whole = Summary(ledger.output, state, exit_code, ledger.rows, _committed(ledger, ledger.units))
    return Summary(
        output=ledger.output,
        state="complete" if complete else "stopped",
        exit_code=code,
        rows=sum(unit.rows for unit in ledger.share),
        job=job,
        run=run or Tally(),
        logged=logged,
        seconds=seconds,
        load=load,
        stages=stages or {},
        peak_rss=peak_rss() + (load.peak_rss if load else 0),
        reason="" if complete else reason,
        shard=str(ledger.shard or ""),
        whole=whole,
    )


def _committed(ledger: Ledger, units: list[Unit]) -> Tally:
    return tally_of(filter(None, (ledger.commits.get(unit.index) for unit in units)))


def tally_of(commits: Iterable[Commit]) -> Tally:
    """What some units come to."""
    job = Tally()
    for commit in commits:
        job.rows += commit.rows
        job.failed += commit.failed
        job.prompt_tokens += commit.prompt_tokens
        job.completion_tokens += commit.completion_tokens
        job.finish_reasons.update(commit.finish_reasons)
        job.failures.update(commit.failures)
    return job


def write_summary(ledger: Ledger, summary: Summary) -> None:
    """A shard's goes beside those of the others; the job's own is written by whichever sees that all is done."""
    if ledger.shard is not None and summary.whole is not None:
        ledger.store.make_folder(SHARDS)
        name = f"{SHARDS}/{ledger.shard.index}-of-{ledger.shard.count}.json"
        ledger.store.replace(name, json.dumps(summary.as_dict(), indent=1).encode())
        summary = summary.whole
    if ledger.shard is None or ledger.complete:
        ledger.store.replace(SUMMARY, json.dumps(summary.as_dict(), indent=1).encode())


def first_rows(output: str | os.PathLike[str], count: int) -> pa.Table:
    """The first committed rows of an output, in the input's order, with the columns of its parts."""
    ledger = Ledger(output)
    tables: list[pa.Table] = []
    for name in commits.names(ledger.store):
        if count <= 0:
            break
        with pq.ParquetFile(ledger.parts.open(commits.parse(ledger.store, name, ledger.store.read(name)).part)) as part:
            table = pa.Table.from_batches(part.iter_batches(max(count, 1)), part.schema_arrow).slice(0, count)
        tables.append(table.replace_schema_metadata(None))
        count -= table.num_rows
    return pa.concat_tables(tables) if tables else pa.table({})


class Progress:
    """Tells how a run is getting on: a bar on a terminal, otherwise a line on stderr now and then.

    Args:
        done: rows that need no more work, whichever run did it.
        tally: what this run has finished; read from another thread, so it may be a moment old.
        shown: False for silence.
    """

    def __init__(
        self,
        rows: int,
        done: Callable[[], int],
        tally: Tally,
        load: Callable[[], Load],
        log_seconds: float,
        shown: bool | None,
    ) -> None:
        self._rows, self._done, self._tally, self._load = rows, done, tally, load
        self._on_terminal = sys.stderr.isatty() and not is_json()
        self._interval = 0.5 if self._on_terminal else log_seconds
        self._shown = shown is not False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="batchinfer-progress", daemon=True)

    def __enter__(self) -> Progress:
        self._begun = time.monotonic()
        self._last = (self._begun, 0)
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._shown:
            self._thread.join()

    def _tell(self) -> None:
        if not self._on_terminal:
            while not self._ended.wait(self._interval):
                say(self._line(), rows=self._rows, done=self._done(), **self._counts())
            return
        from tqdm import tqdm

        how = {"bar_format": BAR, "file": sys.stderr, "dynamic_ncols": True}
        with tqdm(total=self._rows, initial=self._done(), **how) as bar:
            ended = False
            while not ended:
                ended = self._ended.wait(self._interval)
                bar.set_postfix_str(self._engine(), refresh=False)
                bar.update(self._done() - bar.n)

    def _counts(self) -> dict[str, Any]:
        names = ("failed", "prompt_tokens", "completion_tokens")
        return {name: getattr(self._tally, name) for name in names} | {"kv_used": round(self._load().kv_used, 4)}

    def _engine(self) -> str:
        load, tokens, now = self._load(), self._tally.prompt_tokens + self._tally.completion_tokens, time.monotonic()
        rate = (tokens - self._last[1]) / max(now - self._last[0], 1e-3)
        self._last = (now, tokens)
        failed = f", {self._tally.failed:,} failed" if self._tally.failed else ""
        went = mishaps(load.details)
        return f"{rate:,.0f} tok/s, {load.running:,} running, KV {load.kv_used:.0%}{failed}{', ' * bool(went)}{went}"

    def _line(self) -> str:
        done = self._done()
        share = f" ({done / self._rows:.0%})" if self._rows else ""
        seconds = time.monotonic() - self._begun
        left = ""
        if self._tally.rows:
            left = f", {clock(seconds / self._tally.rows * (self._rows - done))} left"
        return f"{done:,}/{self._rows:,} rows{share}, {self._engine()}{left}"
