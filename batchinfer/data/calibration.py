"""Calibration: what a build wants to know of a job's own rows, their prompts and how long they are."""

from __future__ import annotations

from collections.abc import Iterator

from batchinfer.data.draw import draw_rows
from batchinfer.data.estimate import render_drawn
from batchinfer.data.prompt import PromptRenderer
from batchinfer.data.source import Source
from batchinfer.engine.profile import Sample
from batchinfer.job import Job
from batchinfer.request import Request

FITTED_ROWS = 4096  # looked at for their lengths: two seconds


def prompts(job: Job, seed: int = 0) -> Iterator[list[int]]:
    """Token ids of ``build.calibration_rows`` rows drawn from the whole input; rows that cannot be asked are left out.

    Raises:
        JobError: the input cannot be read, or the model has no tokenizer.
    """
    for request in _requests(job, job.build.calibration_rows, seed):
        yield list(request.prompt_token_ids)


def lengths(job: Job, seed: int = 0) -> Sample:
    """Of rows drawn from the whole input, as long as they are before any is cut or refused.

    Raises: JobError, as ``prompts``.
    """
    found = [(len(r.prompt_token_ids), r.sampling.max_tokens) for r in _requests(job, FITTED_ROWS, seed)]
    return Sample(*map(tuple, zip(*found))) if found else Sample((), ())


def _requests(job: Job, rows: int, seed: int) -> Iterator[Request]:
    from batchinfer.engine.model.tokenizer import export_tokenizer

    source = Source.of(job)
    renderer = PromptRenderer(job.prompt, job.sampling, export_tokenizer(job.model.path), 1 << 30)
    drawn, _ = draw_rows(source, rows, seed)
    return (answer for answer in render_drawn(source, renderer, drawn) if isinstance(answer, Request))
