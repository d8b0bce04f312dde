"""Standing: how far a job is, how fast, and why rows failed; told from its ledger, also while it runs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from batchinfer.data.ledger import Ledger
from batchinfer.data.look import look
from batchinfer.data.report import summarize
from batchinfer.data.retries import outcome
from batchinfer.data.series import read_runs
from batchinfer.data.shards import WHOLE, running
from batchinfer.shard import Shard
from batchinfer.words import clock, counted

MOST_SHOWN = 5  # kinds of failure, the commonest first


@dataclass(frozen=True)
class ShardStanding:
    """How far a shard is, and who ran it last."""

    shard: str
    running: bool
    rows: int
    committed: int
    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        state = "done" if self.committed == self.rows else "unfinished"
        who = f"process {self.pid} on {self.host}, since {self.since}"
        state = f"running, {who}" if self.running else state
        return f"shard {self.shard} · {self.committed:,} of {self.rows:,} rows committed · {state}"


@dataclass(frozen=True)
class Pace:
    """How fast the runs are that are at work, all together, since each of them opened its engine."""

    rows_per_second: float
    tokens_per_second: float  # in and out
    remaining_seconds: float  # for all rows that are left

    def __str__(self) -> str:
        return (
            f"{self.rows_per_second:,.1f} rows/s, {self.tokens_per_second:,.0f} tok/s, "
            f"about {clock(self.remaining_seconds)} left"
        )


@dataclass
class Standing:
    """How far a job is."""

    ledger: Ledger
    running: bool
    pace: Pace | None = None  # while it runs, once rows came back
    shards: list[ShardStanding] = field(default_factory=list)

    @property
    def state(self) -> str:
        return "complete" if self.ledger.complete else "running" if self.running else "unfinished"

    def as_dict(self) -> dict[str, Any]:
        whole = summarize(self.ledger, max_failed_fraction=1.0)
        shards = {"shards": [asdict(shard) for shard in self.shards]} if self.shards else {}
        retries = [outcome(self.ledger, retry) for retry in self.ledger.retries]
        more = shards | ({"retries": retries} if retries else {})
        pace = {"pace": asdict(self.pace) if self.pace else None}
        return {"output": str(whole.output)} | whole.standing() | {"state": self.state} | pace | more

    def __str__(self) -> str:
        rows, job = self.ledger.rows, summarize(self.ledger, max_failed_fraction=1.0).job
        done = counted(rows, "row")
        if job.rows < rows:
            done = f"{job.rows:,} of {done} ({job.rows / rows:.0%})"
        hint = ", run it again to go on" if self.state == "unfinished" else ""
        line = (
            f"{self.state}{hint} · {done} committed{job.losses} · "
            f"{job.prompt_tokens:,} tokens in, {job.completion_tokens:,} out{self._retried()} · {self.ledger.output}"
        )
        more = [str(self.pace)] if self.pace else []
        more += [f"{count:,} failed: {kind}" for kind, count in job.failures.most_common(MOST_SHOWN)]
        more += map(str, self.shards)
        return "\n".join([line, *(f"  {told}" for told in more)])

    def _retried(self) -> str:
        """The last retry, and whether it is to be taken up again."""
        if not self.ledger.retries:
            return ""
        last = outcome(self.ledger, self.ledger.retries[-1])
        told = f" · retry {last['retry']}: {last['superseded']:,} of {counted(last['rows'], 'row')} superseded"
        left = last["rows"] - last["superseded"] - last["kept"]
        return told + (f", {left:,} left, retry it again to go on" if left and not self.running else "")


def standing(output: str | os.PathLike[str]) -> Standing:
    """Raises what ``look`` raises."""
    ledger = look(output)
    at_work: list[Shard | None] = [*running(ledger.store)]
    shards = _shards(ledger, at_work)
    if ledger.store.is_locked(WHOLE):
        at_work.append(None)
    return Standing(ledger, bool(at_work), _pace(ledger, at_work) if at_work else None, shards)


def _pace(ledger: Ledger, at_work: list[Shard | None]) -> Pace | None:
    last = {run.begin["shard"]: run for run in read_runs(ledger.store)}
    runs = [last[name] for name in (str(shard or "") for shard in at_work) if name in last]
    rates = [
        [run.points[name][-1] / run.seconds for name in ("computed", "prompt_tokens", "completion_tokens")]
        for run in runs
        if run.seconds and run.summary is None
    ]
    rows, *tokens = (float(sum(rate)) for rate in zip(*rates)) if rates else (0.0,)
    if not rows:
        return None
    left = ledger.rows - sum(commit.rows for commit in ledger.commits.values())
    return Pace(rows, sum(tokens), left / rows)


def _shards(ledger: Ledger, at_work: list[Shard | None]) -> list[ShardStanding]:
    """The shards of the last runs, if those were shards."""
    leases: dict[Shard, dict[str, Any]] = {}
    for name in reversed(ledger.store.list("leases", ".json")):
        lease = json.loads(ledger.store.read(f"leases/{name}"))
        if not lease.get("shard", "-")[0].isdigit():  # a run of the whole, or an engine that has no share of its own
            break
        shard = Shard.of(lease["shard"])
        if any(shard.count != other.count for other in leases):
            break
        leases.setdefault(shard, lease)
    found = []
    for shard, lease in sorted(leases.items()):
        share = ledger.share_of(shard)
        committed = sum(unit.rows for unit in share if unit.index in ledger.commits)
        rows = sum(unit.rows for unit in share)
        who = (lease[key] for key in ("pid", "host", "since"))
        found.append(ShardStanding(str(shard), shard in at_work, rows, committed, *who))
    return found
