"""Calibration: prompts of the job itself, for builds that look at activations."""

from __future__ import annotations

from collections.abc import Iterator

from batchinfer.data.draw import draw_rows
from batchinfer.data.estimate import render_drawn
from batchinfer.data.prompt import PromptRenderer
from batchinfer.data.source import Source
from batchinfer.job import Job
from batchinfer.request import Request


def prompts(job: Job, seed: int = 0) -> Iterator[list[int]]:
    """Token ids of ``build.calibration_rows`` rows drawn from the whole input; rows that cannot be asked are left out.

    Raises:
        JobError: the input cannot be read, or the model has no tokenizer.
    """
    from batchinfer.engine.model.tokenizer import export_tokenizer

    source = Source.of(job)
    renderer = PromptRenderer(job.prompt, job.sampling, export_tokenizer(job.model.path), 1 << 30)
    drawn, _ = draw_rows(source, job.build.calibration_rows, seed)
    for answer in render_drawn(source, renderer, drawn):
        if isinstance(answer, Request):
            yield list(answer.prompt_token_ids)
