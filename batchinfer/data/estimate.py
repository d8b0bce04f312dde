"""Estimate: what a job will cost, foretold from a sample of its rows without loading the model."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchinfer.data.draw import draw_rows
from batchinfer.data.journal import ResultSchema
from batchinfer.data.ledger import Ledger
from batchinfer.data.look import look
from batchinfer.data.prompt import PromptRenderer, check_columns
from batchinfer.data.series import average_rate, read_runs
from batchinfer.data.sink import OutputSchema
from batchinfer.data.source import Source, Unit
from batchinfer.data.stats import Lengths, kind_of
from batchinfer.errors import JobError
from batchinfer.job import Job
from batchinfer.request import Completion, Request
from batchinfer.words import clock, counted

PREDICTION = "prediction.json"
CHUNK_ROWS = 512  # rendered at a time
Range = tuple[int, int]


@dataclass
class Estimate:
    """What is expected of the whole job. Ranges are 95 % intervals of the sample's mean, not promises."""

    files: int
    rows: int
    sampled: int
    longest_sequence: int  # prompt plus completion tokens that the engine will hold
    prompt: Lengths
    tokens_in: Range
    tokens_out: Range
    tokens_out_from: str  # where the range comes from
    overlong: dict[str, int]  # address file:row, of the sample → its prompt tokens
    overlong_rows: Range  # expected in the whole job
    failures: Counter[str]  # kind → rows of the sample, over-long ones apart
    examples: dict[str, str]  # kind → address of the first such row
    rate: float | None = None  # tokens a second
    rate_from: str = ""
    time: float = field(default_factory=time.time)

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Generating alone, without loading the model; a rate is taken to hold within a tenth."""
        if not self.rate:
            return None
        low, high = (self.tokens_in[i] + self.tokens_out[i] for i in (0, 1))
        return low / self.rate / 1.1, high / self.rate / 0.9

    def as_dict(self) -> dict[str, Any]:
        told = {name: value for name, value in vars(self).items() if name != "prompt"}
        lengths = self.prompt.quantiles() | {"mean": round(self.prompt.mean, 1)}
        return told | {
            "failures": dict(self.failures),
            "prompt_tokens": lengths,
            "histogram": [asdict(bin) for bin in self.prompt.bins()],
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        lines = [f"{counted(self.rows, 'row')} in {counted(self.files, 'file')}; looked at {self.sampled:,} of them"]
        if self.prompt.count:
            lines += ["", "prompt tokens", *_bars(self.prompt)]
            named = {"mean": f"{self.prompt.mean:,.0f}"} | {k: f"{v:,}" for k, v in self.prompt.quantiles().items()}
            lines.append("  " + " · ".join(f"{name} {value}" for name, value in named.items()))
        lines += ["", f"tokens in   {_range(self.tokens_in)}"]
        lines.append(f"tokens out  {_range(self.tokens_out)}, {self.tokens_out_from}")
        if self.seconds is not None:
            low, high = self.seconds
            lines.append(f"time        {clock(low)} to {clock(high)}, at {self.rate:,.0f} tok/s {self.rate_from}")
        else:
            lines.append(
                "time        unknown: no run of this output yet; --tok-s gives a rate, `batchinfer bench engine`"
            )
            lines.append("            measures one")
        lines.append("")
        if self.overlong:
            share, most = len(self.overlong) / self.sampled, self.longest_sequence - 1
            lines.append(
                f"{counted(len(self.overlong), 'sampled row')} of more than {most:,} prompt tokens ({share:.1%}), "
                f"{_range(self.overlong_rows)} expected in all; prompt.on_overlong decides:"
            )
            lines += _first(f"  {row}: {tokens:,} tokens" for row, tokens in self.overlong.items())
        for kind, count in self.failures.most_common():
            share = f"{counted(count, 'sampled row')} failed ({count / self.sampled:.1%})"
            lines.append(f"{share}: {kind} (first: {self.examples[kind]})")
        if self.sampled and not self.overlong and not self.failures:
            lines.append("every sampled row can be asked")
        return "\n".join(lines).rstrip()


def estimate(job: Job, sample: int = 1000, seed: int = 0, tok_s: float | None = None) -> Estimate:
    """Render and tokenise ``sample`` rows, drawn with ``seed`` and spread over the files, and foresee the rest.

    Args:
        tok_s: tokens a second, in and out; unless given, that of the runs on the job's output so far.

    Raises:
        JobError: something that would end the run before its first row.
    """
    from batchinfer.engine.model.tokenizer import export_tokenizer

    source = Source.of(job)
    check_columns(job.prompt, job.sampling, source.schema)
    OutputSchema(job.output, source.schema, ResultSchema(job.sampling.n), job.input.id_column)
    longest = longest_sequence(job)
    folder = Path(job.engine.plan, "tokenizer") if job.engine.plan else export_tokenizer(job.model.path)
    renderer = PromptRenderer(job.prompt, job.sampling, folder, 1 << 30)  # over-long ones are to be counted in full
    drawn, rows = draw_rows(source, sample, seed)
    found = Estimate(
        len(source.files), rows, len(drawn), longest, Lengths(), (0, 0), (0, 0), "", {}, (0, 0), Counter(), {}
    )
    sampled = [_note(found, answer, job.prompt.on_overlong) for answer in render_drawn(source, renderer, drawn)]
    found.tokens_in = _whole([tokens for tokens, _ in sampled], rows)
    found.overlong_rows = _share(len(found.overlong), found.sampled, rows)
    earlier = _earlier(job)
    found.tokens_out, found.tokens_out_from = _tokens_out(job, earlier, [most for _, most in sampled], rows)
    if tok_s is not None:
        found.rate, found.rate_from = tok_s, "as told"
    elif earlier is not None and (rate := average_rate(read_runs(earlier.store))):
        found.rate, found.rate_from = rate, "as on this output so far"
    return found


def longest_sequence(job: Job) -> int:
    """Prompt plus completion tokens that the job's engine will hold.

    Raises:
        ModelError: the model or the plan cannot be read.
    """
    if job.engine.backend == "echo":
        return 1 << 20
    from batchinfer.engine.model.source import DEFAULT_SEQ_LEN, ModelSource

    if job.engine.plan is not None:
        try:
            plan = json.loads(Path(job.engine.plan, "plan.json").read_bytes())
            return max(profile["seq_len"] for profile in plan.get("profiles") or [plan["profile"]])
        except (OSError, ValueError, KeyError):
            raise JobError(f"engine.plan: no engine at {job.engine.plan}; `batchinfer build` makes one") from None
    asked = [profile.seq_len.max for profile in job.engine.profile]
    return max(length or min(ModelSource.resolve(job.model.path).max_position(), DEFAULT_SEQ_LEN) for length in asked)


def save(found: Estimate, output: str) -> Path | str:
    """Keep an estimate beside the output, for the report to set what happened against."""
    store = Ledger(output).store
    store.make_folder(".")
    store.replace(PREDICTION, json.dumps(found.as_dict(), indent=1).encode())
    return store.path(PREDICTION)


def render_drawn(source: Source, renderer: PromptRenderer, units: list[Unit]) -> Iterator[Request | Completion]:
    """The request or failure of each unit's one row, keyed by its address."""
    columns = list(renderer.columns) or source.schema.names[:1]
    held: list[tuple[str, pa.Table]] = []
    last = len(units) - 1
    for unit, table in source.read(units, columns):
        held.append((f"{unit.file}:{unit.first_row}", table))
        if len(held) == CHUNK_ROWS or unit.index == last:
            keys = [key for key, _ in held]
            yield from renderer.render(pa.concat_tables([table for _, table in held]), keys, [0] * len(keys))
            held = []


def _note(found: Estimate, answer: Request | Completion, on_overlong: str) -> tuple[int, int]:
    """Take down what became of a row. Returns the tokens it puts in and the most that can come out."""
    if isinstance(answer, Completion):
        kind = kind_of(answer.error or "")
        found.failures[kind] += 1
        found.examples.setdefault(kind, str(answer.key))
        return 0, 0
    tokens, sampling, longest = len(answer.prompt_token_ids), answer.sampling, found.longest_sequence
    found.prompt.add(np.array([tokens]))
    if tokens >= longest:
        found.overlong[str(answer.key)] = tokens
        if on_overlong in ("error", "skip"):
            return 0, 0
        tokens = longest - min(sampling.max_tokens, max(1, longest // 4))  # as Truncation.most_tokens
    return tokens, min(sampling.max_tokens, longest - tokens) * sampling.n


def _tokens_out(job: Job, earlier: Ledger | None, most: list[int], rows: int) -> tuple[Range, str]:
    """Tokens out of the whole job, and where they are known from. ``most``: what each sampled row may make."""
    low, high = _whole(most, rows)
    if job.sampling.ignore_eos and "ignore_eos" not in job.sampling.columns:
        return (low, high), "as ignore_eos makes every completion as long as it may be"
    if earlier is not None and (seen := _observed_out(earlier, rows)):
        return (min(seen[0], high), min(seen[1], high)), "as in the rows finished so far"
    least = round(rows * sum(map(bool, most)) / max(len(most), 1)) * job.sampling.n
    return (min(least, high), high), "the most being what max_tokens allows"


def _earlier(job: Job) -> Ledger | None:
    """The ledger of the job's output, if this very job was begun there."""
    with contextlib.suppress(JobError):
        ledger = look(job.output.path)
        before, now = ledger.identity["semantic"], json.loads(json.dumps(job.semantic(), default=list))  # type: ignore
        return ledger if all(before.get(key) == value for key, value in now.items()) else None
    return None


def _observed_out(ledger: Ledger, rows: int) -> Range | None:
    """Tokens out of ``rows`` rows, from the units committed: mean ± two standard errors. None if there are none."""
    commits = [commit for commit in ledger.commits.values() if commit.rows]
    if not commits:
        return None
    mean = sum(commit.completion_tokens for commit in commits) / sum(commit.rows for commit in commits)
    if ledger.complete:
        slack = 0.0
    elif len(commits) == 1:
        slack = mean / 10
    else:
        spread = float(np.std([commit.completion_tokens / commit.rows for commit in commits], ddof=1))
        slack = 2 * spread / math.sqrt(len(commits)) * math.sqrt(1 - len(commits) / len(ledger.units))
    return max(0, round(rows * (mean - slack))), round(rows * (mean + slack))


def _whole(sampled: list[int], rows: int) -> Range:
    """The sum over all rows: mean ± two standard errors, less the more of the rows were seen."""
    if not sampled:
        return 0, 0
    error = float(np.std(sampled, ddof=1)) / math.sqrt(len(sampled)) if len(sampled) > 1 else 0.0
    slack = 2 * error * math.sqrt(1 - len(sampled) / rows)
    mean = float(np.mean(sampled))
    return max(0, round(rows * (mean - slack))), round(rows * (mean + slack))


def _share(hits: int, sampled: int, rows: int) -> Range:
    """Rows of ``rows`` expected where ``hits`` of ``sampled`` were: Wilson's 95 % interval (1927)."""
    if sampled >= rows:
        return hits, hits
    share, z2 = hits / sampled, 4.0
    centre, spread = share + z2 / (2 * sampled), 2 * math.sqrt(share * (1 - share) / sampled + z2 / (4 * sampled**2))
    low, high = ((centre + sign * spread) / (1 + z2 / sampled) for sign in (-1, 1))
    return max(hits, round(low * rows)), round(high * rows)


def _bars(lengths: Lengths, width: int = 40) -> list[str]:
    bins = lengths.bins(16)
    most = max(bin.count for bin in bins)
    names = [f"{bin.first:,}–{bin.last:,}" if bin.last > bin.first else f"{bin.first:,}" for bin in bins]
    room = max(map(len, names))
    return [
        f"  {name:>{room}}  {_bar(bin.count / most * width):<{width}} {bin.count:,}" for name, bin in zip(names, bins)
    ]


def _bar(length: float) -> str:
    """A bar to an eighth of a character; what is not nothing is seen."""
    eighths = max(round(length * 8), 1) if length else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _first(lines: Any, most: int = 10) -> list[str]:
    lines = list(lines)
    return lines[:most] + ([f"  … and {len(lines) - most:,} more"] if len(lines) > most else [])


def _range(span: Range) -> str:
    return f"{span[0]:,}" if span[0] == span[1] else f"{span[0]:,} to {span[1]:,}"
