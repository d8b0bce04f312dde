"""The door every engine stands behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchinfer.request import Completion, Load, Request


class Backend(Protocol):
    """An opened engine.

    ``generate`` pulls a request when it has room and yields completions as they finish, in any order: backpressure,
    in-flight batching and bounded memory follow from that. ``None`` from the iterator means "nothing is ready at the
    moment, carry on with what you have"; the iterator's end means no request will follow. A request that cannot be
    served yields a Completion with ``error``; an exception from ``generate`` means the engine itself is unusable
    (``errors.EngineError``).

    ``load`` may be called from any thread, and its counters move while the engine gets on, and only then: one that
    neither pulls, nor yields, nor moves them for ``limits.engine_timeout`` is taken to hang.
    """

    tokenizer_dir: Path  # folder with tokenizer.json, tokenizer_config.json and, for chat models, a chat template
    max_seq_len: int  # prompt plus completion tokens a request may have
    fingerprint: dict[str, Any]  # what decides the tokens: weights, tokenizer, dtype, quantization, engine

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]: ...

    def load(self) -> Load: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Isolation:
    """What an engine wants of the process it runs in. A backend class says so in ``isolation(job)``, if it must."""

    scrub: tuple[str, ...] = ()  # prefixes of environment variables that the process must not see
    environ: Mapping[str, str] = field(default_factory=dict)  # variables that it gets
    recycle_rows: int = 0  # answered rows after which a fresh process takes over; 0: never
