"""A look at a job without running it: at its input and templates before, at its ledger at any time."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from batchinfer.data.journal import ResultSchema
from batchinfer.data.ledger import Ledger
from batchinfer.data.prompt import PromptRenderer, check_columns
from batchinfer.data.sink import OutputSchema
from batchinfer.data.source import Source
from batchinfer.data.store import open_store
from batchinfer.errors import JobError
from batchinfer.job import Job
from batchinfer.request import Completion
from batchinfer.words import counted


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
        some = ", of which filter, sample and limit choose" if self.chooses else ""
        lines = [f"The job is valid: {counted(self.rows, 'row')} in {counted(self.files, 'file')}{some}, {used}"]
        if self.tried:
            asked = self.tried - len(self.failures)
            tokens = counted(self.prompt_tokens, "prompt token")
            lines.append(f"{asked:,} of the first {counted(self.tried, 'row')} can be asked, {tokens}")
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


def look(output: str | os.PathLike[str]) -> Ledger:
    """The ledger of an output as it stands, also while a run holds it: nothing is locked, changed or repaired.

    Raises:
        JobError: no job was begun there.
        IntegrityError: a control file is damaged.
    """
    ledger = _Unlocked(output)
    ledger._load()
    if ledger.identity is None:
        raise JobError(f"no job was begun in {ledger.output}: there is no {ledger.store.path('job.json')}")
    return ledger


class _Unlocked(Ledger):
    def _check_published(self) -> None:
        """A part may be on its way."""

    def _clear(self) -> None:
        """What lies about may belong to the run that holds the lock."""
