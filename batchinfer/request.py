"""The words everything else shares: what is asked of an engine, how, and what comes back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

FinishReason = Literal["stop", "length", "error", "skipped"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    Filters apply in the order of the field's convention: repetition penalty, temperature, top-k, top-p, min-p.
    Defaults that switch a filter off: ``top_k=0``, ``top_p=1``, ``min_p=0``, ``repetition_penalty=1``.

    Raises:
        ValueError: a field is out of range; the message names the field, the range and the value.
    """

    max_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # as in CTRL (arXiv:1909.05858), over prompt and completion
    seed: int = 0  # tokens depend on (seed, completion index, position) alone, never on the batch
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, tuple):  # a lone string, or a list
                object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))
        for name, (low, high, wanted) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
            if name in _INTEGERS and not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise ValueError("top_p and repetition_penalty must be greater than 0")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ValueError(f"stop must hold non-empty strings, got {self.stop!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))


_INTEGERS = frozenset({"max_tokens", "top_k", "seed", "n"})
_RANGES = {
    "max_tokens": (1, 2**31 - 1, "between 1 and 2147483647"),
    "temperature": (0, 100, "between 0 (greedy) and 100"),
    "top_k": (0, 2**31 - 1, "0 (off) or between 1 and 2147483647"),
    "top_p": (0, 1, "greater than 0 and at most 1"),
    "min_p": (0, 1, "between 0 and 1"),
    "repetition_penalty": (0, 100, "greater than 0 and at most 100"),
    "seed": (-(2**63), 2**63 - 1, "a 64-bit whole number"),
    "n": (1, 128, "between 1 and 128"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for an engine. ``key`` comes back on the completion and means nothing to the engine."""

    key: Hashable
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams = SamplingParams()


@dataclass(frozen=True, slots=True)
class Output:
    """One of the ``n`` completions of a request. ``token_ids`` include a final stop token; ``text`` does not."""

    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """Everything about one finished request. With an ``error`` there are no outputs."""

    key: Hashable
    outputs: tuple[Output, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int = 0  # prompt tokens whose KV pages were shared with another request
    error: str | None = None
    retryable: bool = False  # the error is the engine's own: the same request may do well another time
    skipped: bool = False  # the job wants rows like this one passed over: no failure


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
    peak_rss: int = 0  # bytes, of processes of the engine's own
    details: dict[str, Any] = field(default_factory=dict)  # backend-specific, goes into summary.json as it is
