"""Profile: the shapes that an engine is built for, and what the rows of a job make of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from batchinfer.engine.model.source import DEFAULT_SEQ_LEN
from batchinfer.errors import ModelError

# What an engine is built for when nobody says: (sequences, tokens a step). A CPU's caches hold the activations of a few
# hundred rows, and 320 were no slower than 192, 256 and 512; a GPU needs thousands of tokens a step to be busy.
_DEFAULTS = {"cpu": (128, 320), "cuda": (1024, 8192)}
_USUAL_SEQ_LEN = {"cpu": 128, "cuda": 1 << 30}  # a host's memory is others' too

MOST_FITTED = 2  # times the sequences at once that a fitted profile may have, for being shorter

Asked = Mapping[str, "int | Mapping[str, int]"]  # as [engine.profile] in a job; a number is the most


@dataclass(frozen=True)
class Shape:
    batch_size: int  # sequences that run at once
    step_tokens: int  # tokens of one step, prefill and decode together
    seq_len: int  # prompt plus completion tokens of one sequence


@dataclass(frozen=True)
class Profile(Shape):
    """The largest shape, beside what is usual and what is least.

    A step stays within the largest shape of one profile: no more sequences, no more tokens, no longer sequence. The
    usual one is what kernels are timed at and what memory for KV pages is reckoned with; a least number of sequences
    has them timed there as well.
    """

    opt: Shape = Shape(0, 0, 0)
    min: Shape = Shape(1, 1, 1)

    def __post_init__(self) -> None:
        if self.opt == Shape(0, 0, 0):
            object.__setattr__(self, "opt", Shape(self.batch_size, self.step_tokens, self.seq_len))

    @classmethod
    def of(cls, asked: Asked, device: str, most_seq_len: int) -> Profile:
        """What is asked for, with defaults for what is not.

        Args:
            most_seq_len: positions that the model knows.

        Raises:
            ModelError: the numbers contradict each other, or the model.
        """
        named = {f.name: _spread(f.name, asked.get(f.name, 0)) for f in fields(Shape)}
        batch, step, length = (named[f.name] for f in fields(Shape))
        default_batch, default_step = _DEFAULTS[device]
        batch_size = batch["max"] or max(default_batch, batch["opt"], batch["min"])
        step_tokens = max(step["max"] or max(default_step, step["opt"], step["min"]), batch_size)
        seq_len = length["max"] or max(min(most_seq_len, DEFAULT_SEQ_LEN), length["opt"], length["min"])
        if seq_len > most_seq_len:
            raise ModelError(
                f"engine.profile.seq_len is {seq_len}, more than the {most_seq_len} positions of the model"
            )
        made = cls(
            batch_size,
            step_tokens,
            seq_len,
            Shape(
                batch["opt"] or batch_size,
                step["opt"] or step_tokens,
                length["opt"] or max(min(seq_len, _USUAL_SEQ_LEN[device]), length["min"]),
            ),
            Shape(*(values["min"] or 1 for values in (batch, step, length))),
        )
        for name, value in asdict(made.opt).items():
            least, most = getattr(made.min, name), getattr(made, name)
            if not least <= value <= most:
                raise ModelError(
                    f"engine.profile.{name} must have min ≤ opt ≤ max, got min {least}, opt {value}, max {most}"
                )
        return made

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Profile:
        """Of ``asdict``."""
        return cls(**{**value, "opt": Shape(**value["opt"]), "min": Shape(**value["min"])})

    def differs(self, asked: Asked) -> str | None:
        """The first number asked for that this is not, in words; None where it is all that."""
        for name, value in asked.items():
            for which, number in _spread(name, value).items():
                built = getattr(_shapes(self)[which], name)
                if number not in (0, built):
                    return f"{_key(name, which)} {built}, not {number}"
        return None

    def __str__(self) -> str:
        return (
            f"{self.batch_size} sequences of up to {self.seq_len} tokens at once (usually {self.opt.seq_len}), "
            f"{self.step_tokens} tokens a step"
        )


def as_asked(profile: Profile) -> Asked:
    """What to ask for in order to get ``profile``, on any device."""
    return {f.name: {which: getattr(shape, f.name) for which, shape in _shapes(profile).items()} for f in fields(Shape)}


def asks_nothing(asked: Asked) -> bool:
    return not any(number for name, value in asked.items() for number in _spread(name, value).values())


def _shapes(profile: Profile) -> dict[str, Shape]:
    return {"min": profile.min, "opt": profile.opt, "max": profile}


def _spread(name: str, value: int | Mapping[str, int]) -> dict[str, int]:
    values = {"min": 0, "opt": 0, "max": 0} | (dict(value) if isinstance(value, Mapping) else {"max": value})
    for which, number in values.items():
        if number < 0:
            raise ModelError(f"engine.profile.{_key(name, which)} must be 0 (a default) or more, got {number}")
    return values


def _key(name: str, which: str) -> str:
    return name if which == "max" else f"{name}.{which}"


def in_order(profiles: Iterable[Profile]) -> tuple[Profile, ...]:
    """Narrow ones first: the first that holds something is the one to take."""
    return tuple(sorted(profiles, key=lambda profile: (profile.seq_len, profile.batch_size, profile.step_tokens)))


def limits(profiles: Sequence[Profile]) -> Shape:
    """What some profile allows: the most of each."""
    return Shape(*(max(getattr(profile, f.name) for profile in profiles) for f in fields(Shape)))


@dataclass(frozen=True)
class Sample:
    """Lengths of some rows of a job: the tokens that go in, and the most that come out."""

    prompts: tuple[int, ...]
    completions: tuple[int, ...]


def fit(whole: Profile, sample: Sample) -> tuple[Profile, ...]:
    """Profiles for a job, from rows of it: a narrow one for what was seen, and ``whole`` for what may yet come.

    Shorter sequences leave memory for more of them at once, and the more there are, the less often weights are read.

    Args:
        whole: what the engine would be built for without looking.

    Raises:
        ModelError: there is no row that ``whole`` takes.
    """
    prompt, completion = np.array(sample.prompts, np.int64), np.array(sample.completions, np.int64)
    fits = prompt < whole.seq_len
    if not fits.any():
        raise ModelError(
            f"{len(prompt)} rows looked at, none of them a prompt of fewer than {whole.seq_len} tokens: nothing to fit"
        )
    prompt = prompt[fits]
    lengths = np.minimum(prompt + completion[fits], whole.seq_len)
    usual, longest = math.ceil(lengths.mean()), min(_rounded(int(lengths.max()), 32), whole.seq_len)
    batch_size = whole.batch_size
    if longest < whole.seq_len:  # as many as fill the memory that the whole profile was made for
        filling = min(whole.batch_size * whole.opt.seq_len // usual, MOST_FITTED * whole.batch_size)
        batch_size = max(filling // 16 * 16, whole.batch_size)
    step_tokens = max(whole.step_tokens, batch_size)
    # A step has a token of each sequence, and of the prompts as many as it takes to replace those that end.
    in_a_step = math.ceil(batch_size * lengths.mean() / max(float((lengths - prompt).mean()), 1.0))
    narrow = Profile(
        batch_size,
        step_tokens,
        longest,
        opt=Shape(batch_size, min(in_a_step, step_tokens), usual),
        min=Shape(1, 1, int(lengths.min())),
    )
    return (narrow, whole) if longest < whole.seq_len else (narrow,)


def _rounded(value: int, to: int) -> int:
    return -(-value // to) * to
