"""The door every engine stands behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchinfer.request import Completion, Request


@dataclass(slots=True)
class Load:
    """What an engine is doing right now, for progress lines. Counters are totals since it was opened."""

    running: int = 0  # sequences that hold KV pages
    waiting: int = 0
    kv_used: float = 0.0  # share of KV pages in use, 0..1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    details: dict[str, Any] = field(default_factory=dict)  # backend-specific, goes into summary.json as it is


class Backend(Protocol):
    """An opened engine.

    ``generate`` pulls a request when it has room and yields completions as they finish, in any order: backpressure,
    in-flight batching and bounded memory follow from that. ``None`` from the iterator means "nothing is ready at the
    moment, carry on with what you have"; the iterator's end means no request will follow. A request that cannot be
    served yields a Completion with ``error``; an exception from ``generate`` means the engine itself is unusable
    (``errors.EngineError``).
    """

    tokenizer_dir: Path  # folder with tokenizer.json, tokenizer_config.json and, for chat models, a chat template
    max_seq_len: int  # prompt plus completion tokens a request may have
    fingerprint: dict[str, Any]  # what decides the tokens: weights, tokenizer, dtype, quantization, engine

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]: ...

    def load(self) -> Load: ...

    def close(self) -> None: ...
