"""What the value of a key may be, beside numbers and texts: lists, places, moments, sizes, spans, shares."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from batchinfer import deadline, shard, size
from batchinfer.location import checked


def as_tuple(value: Any) -> Any:
    """TOML writes a list where a Job holds a tuple; a lone string stands for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _written_as(parse: Any) -> tuple[Any, Any]:
    """A text that ``parse`` understands and that is kept as it is; TOML's own dates and times become text."""
    to_text = BeforeValidator(lambda value: value.isoformat() if hasattr(value, "isoformat") else value)
    return to_text, AfterValidator(lambda value: parse(value) and value)


Strings = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Some = Annotated[str, Field(min_length=1)]  # "" would be the folder in which batchinfer is started
Place = Annotated[Some, AfterValidator(checked)]  # a path or a URL
Places = Annotated[
    tuple[Some, ...],
    Field(min_length=1),
    BeforeValidator(as_tuple),
    AfterValidator(lambda paths: tuple(map(checked, paths))),
]
SomeStrings = Annotated[tuple[Some, ...], Field(min_length=1), BeforeValidator(as_tuple)]
Integers = Annotated[tuple[int, ...], BeforeValidator(as_tuple)]
Moment = Annotated[(str, *_written_as(deadline.moment))]
Size = Annotated[(str, *_written_as(size.in_bytes))]
Span = Annotated[(str, *_written_as(deadline.seconds))]
Share = Annotated[(str, *_written_as(shard.check))]
