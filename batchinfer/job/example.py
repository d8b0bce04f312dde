"""A job file to start from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from batchinfer.job.job import Job
from batchinfer.job.problems import NEEDED
from batchinfer.job.sections import RangeSection, Section


def starter() -> str:
    """A job file to start from: the keys that a job must have, and all others as comments with their defaults."""
    examples = ("prompts.parquet", "Summarise in one sentence: {{ text }}", "smollm2-135m-instruct", "out")
    needed = dict(zip(NEEDED.values(), examples))
    head = "# A batchinfer job. Relative paths count from the folder in which batchinfer is started.\n"
    sections = ((name, section.annotation) for name, section in Job.model_fields.items())
    return "\n".join([head, *("\n".join(_section(name, section, needed)) for name, section in sections)])


def _section(name: str, section: Any, needed: Mapping[str, str]) -> Iterator[str]:
    yield f"[{name}]"
    nested = []
    for key, about in section.model_fields.items():
        default = needed.get(f"{name}.{key}", about.get_default(call_default_factory=True))
        if isinstance(default, tuple) and default and isinstance(default[0], Section):
            [default] = default
        if isinstance(default, Section) and not isinstance(default, RangeSection):
            nested.append((f"{name}.{key}", type(default)))
            continue
        shown = '"…"' if default is None else json.dumps(0 if isinstance(default, RangeSection) else default)
        line = f"{key} = {shown}" if f"{name}.{key}" in needed else f"# {key} = {shown}"
        yield f"{line:<40}  # {about.description}" if about.description else line
    yield ""
    for inner in nested:
        yield from _section(*inner, needed)
