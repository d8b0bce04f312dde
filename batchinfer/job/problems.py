"""What is wrong with a job, as a person is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from batchinfer.location import redacted

# What a job must say, by section: where a section is missing, this key of it is.
NEEDED = {"input": "input.path", "prompt": "prompt.template", "model": "model.path", "output": "output.path"}


def explain(error: ValidationError, origin: Mapping[str, str], job: type[BaseModel]) -> str:
    """Every problem that a job has, with its key and where that came from (``origin``: dotted key → name)."""
    lines = []
    for problem in error.errors():
        location = tuple(part for part in problem["loc"] if isinstance(part, str))
        key = ".".join(location)
        where = f" ({origin[key]})" if key in origin else ""
        kind = problem["type"]
        if kind == "extra_forbidden":
            lines.append(f"unknown key {key!r}{where}{nearest(location[-1], _fields_at(job, location[:-1]))}")
        elif kind == "missing":
            key = NEEDED.get(key, key)
            lines.append(f"missing {key}: the job must say it in the file or with --set {key}=…")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            field = f"{key}.{message.split(maxsplit=1)[0]}"  # a section's own checks begin with the field they mean
            where = f" ({origin[field]})" if field in origin else where
            shown = f", got {redacted(repr(problem['input']))}" if kind != "value_error" else ""
            lines.append(f"{key or 'job'}{where}: {message[0].lower() + message[1:]}{shown}")
    return "\n".join(lines) if len(lines) == 1 else "the job has several problems:\n  " + "\n  ".join(lines)


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean …?``, or what is valid."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"


def _fields_at(job: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section that ``location`` lies in."""
    model: Any = job
    for part in location:
        model = _section(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> Any:
    """The type itself, or that of the items of a tuple."""
    return get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
