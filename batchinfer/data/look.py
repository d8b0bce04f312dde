"""A look at a job without running it: at its input and templates before, at its ledger meanwhile."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from batchinfer.data.journal import ResultSchema
from batchinfer.data.ledger import Ledger
from batchinfer.data.prompt import PromptRenderer, check_columns
from batchinfer.data.report import summarize
from batchinfer.data.retries import outcome
from batchinfer.data.shards import WHOLE, running
from batchinfer.data.sink import OutputSchema
from batchinfer.data.source import Source
from batchinfer.data.store import open_store
from batchinfer.errors import JobError
from batchinfer.job import Job
from batchinfer.request import Completion
from batchinfer.shard import Shard


@dataclass
class Findings:
    """What a job will read and ask."""

    files: int
    rows: int
    columns: tuple[str, ...]  # those that prompts and sampling parameters are made of
    chooses: bool = False  # whether filter, sample or limit leave some of the rows out
    tried: int = 0  # rows turned into prompts
    prompt_tokens: int = 0  # of those
    failures: dict[int, str] = field(default_factory=dict)  # row, over all files → why it cannot be asked

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        used = f"uses {', '.join(self.columns)}" if self.columns else "uses no column"
        files = f"{self.files:,} files" if self.files > 1 else "one file"
        some = ", of which filter, sample and limit choose" if self.chooses else ""
        lines = [f"The job is valid: {self.rows:,} rows in {files}{some}, {used}"]
        if self.tried:
            asked = self.tried - len(self.failures)
            lines.append(
                f"{asked:,} of the first {self.tried:,} rows can be asked, {self.prompt_tokens:,} prompt tokens"
            )
        lines += [f"  row {row}: {why}" for row, why in list(self.failures.items())[:10]]
        return "\n".join(lines)


def check_job(job: Job, rows: int = 0) -> Findings:
    """Check input, columns, templates, output names and where the model is; nothing is loaded or written.

    Args:
        rows: turn that many first rows into prompts as well. Needs the model's tokenizer, which takes some seconds
            where it must be converted first.

    Raises:
        JobError: something that would end the run before its first row.
    """
    from batchinfer.engine.model.source import ModelSource

    source = Source.of(job)
    columns = check_columns(job.prompt, job.sampling, source.schema)
    OutputSchema(job.output, source.schema, ResultSchema(job.sampling.n), job.input.id_column)
    open_store(job.output.path)
    if job.engine.plan is None:
        ModelSource.resolve(job.model.path)
    elif not os.path.isdir(job.engine.plan):
        raise JobError(f"engine.plan: no engine folder at {job.engine.plan}; `batchinfer build` makes one")
    findings = Findings(len(source.files), source.rows, columns, source.chooses)
    if rows > 0:
        _try_rows(job, source, rows, findings)
    return findings


def _try_rows(job: Job, source: Source, count: int, findings: Findings) -> None:
    from batchinfer.engine.model.tokenizer import export_tokenizer

    renderer = PromptRenderer(job.prompt, job.sampling, export_tokenizer(job.model.path), 1 << 30)
    columns = list(renderer.columns) or source.schema.names[:1]
    for _, table in source.read(source.units(min(count, 1024)), columns):
        table = table.slice(0, count - findings.tried)
        for answer in renderer.render(table, range(findings.tried, findings.tried + len(table)), [0] * len(table)):
            if isinstance(answer, Completion):
                findings.failures[answer.key] = answer.error
            else:
                findings.prompt_tokens += len(answer.prompt_token_ids)
        findings.tried += len(table)
        if findings.tried >= count:
            break


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


@dataclass
class Standing:
    """How far a job is."""

    ledger: Ledger
    running: bool
    shards: list[ShardStanding] = field(default_factory=list)

    @property
    def state(self) -> str:
        return "complete" if self.ledger.complete else "running" if self.running else "unfinished"

    def as_dict(self) -> dict[str, Any]:
        whole = summarize(self.ledger, max_failed_fraction=1.0)
        shards = {"shards": [asdict(shard) for shard in self.shards]} if self.shards else {}
        retries = [outcome(self.ledger, retry) for retry in self.ledger.retries]
        more = shards | ({"retries": retries} if retries else {})
        return {"output": str(whole.output)} | whole.standing() | {"state": self.state} | more

    def __str__(self) -> str:
        rows, job = self.ledger.rows, summarize(self.ledger, max_failed_fraction=1.0).job
        share = f" of {rows:,} ({job.rows / rows:.0%})" if job.rows < rows else ""
        hint = ", run it again to go on" if self.state == "unfinished" else ""
        line = (
            f"{self.state}{hint} · {job.rows:,}{share} rows committed{job.losses} · "
            f"{job.prompt_tokens:,} tokens in, {job.completion_tokens:,} out{self._retried()} · {self.ledger.output}"
        )
        return "\n".join([line, *(f"  {shard}" for shard in self.shards)])

    def _retried(self) -> str:
        """The last retry, and whether it is to be taken up again."""
        if not self.ledger.retries:
            return ""
        last = outcome(self.ledger, self.ledger.retries[-1])
        told = f" · retry {last['retry']}: {last['superseded']:,} of {last['rows']:,} rows superseded"
        left = last["rows"] - last["superseded"] - last["kept"]
        return told + (f", {left:,} left, retry it again to go on" if left and not self.running else "")


def standing(output: str | os.PathLike[str]) -> Standing:
    """Raises what ``look`` raises."""
    ledger = look(output)
    at_work = running(ledger.store)
    return Standing(ledger, bool(at_work) or ledger.store.is_locked(WHOLE), _shards(ledger, at_work))


def _shards(ledger: Ledger, at_work: list[Shard]) -> list[ShardStanding]:
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


def look(output: str | os.PathLike[str]) -> Ledger:
    """The ledger of an output as it stands, also while a run holds it: nothing is locked, changed or repaired.

    Raises:
        JobError: no job was begun there.
        IntegrityError: a control file is damaged.
    """
    ledger = _Unlocked(output)
    ledger._load()
    if ledger.identity is None:
        raise JobError(f"no job was begun in {ledger.output}: expected its control folder at {ledger.store.root}")
    return ledger


class _Unlocked(Ledger):
    def _check_published(self) -> None:
        """A part may be on its way."""

    def _clear(self) -> None:
        """What lies about may belong to the run that holds the lock."""
