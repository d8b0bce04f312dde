"""The door every engine stands behind."""

from __future__ import annotations

from collections.abc import Iterator
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
    """

    tokenizer_dir: Path  # folder with tokenizer.json, tokenizer_config.json and, for chat models, a chat template
    max_seq_len: int  # prompt plus completion tokens a request may have
    fingerprint: dict[str, Any]  # what decides the tokens: weights, tokenizer, dtype, quantization, engine

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]: ...

    def load(self) -> Load: ...

    def close(self) -> None: ...
