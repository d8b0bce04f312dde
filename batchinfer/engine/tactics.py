"""Tactics: which of the contenders for each operation is fastest on this machine, at the shapes of the profiles.

The build times them with the weights of one layer; the plan keeps what came out, and the engine goes by it. Times are
remembered by everything that decides them, so that a second build need not measure, and comes to the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from batchinfer.cache import digest, keep, kept
from batchinfer.engine.clock import best_seconds
from batchinfer.engine.kernels import KV_DTYPES, AttentionBatch, Kernels, SamplingBatch, contenders
from batchinfer.engine.kernels import __file__ as kernels_home
from batchinfer.engine.kernels.linear import Linear, form_of, linear_contenders
from batchinfer.engine.kernels.linear.fp8 import multiplies_fp8
from batchinfer.engine.model.source import file_digest
from batchinfer.host import available_cores

if TYPE_CHECKING:
    from batchinfer.engine.plan import EnginePlan

# Of the time of the one that is expected to be fastest, another must take less than that to win: so far apart come even
# equals out on a machine that others use, and one that is not our own keeps a CPU's layers from being one call.
CLEARLY = 0.9
_SECONDS = 0.01  # spent on each contender and shape, or _LEAST calls
_LEAST = 3
_MOST_KEYS = 1 << 18  # of one layer that attention is timed with: a gigabyte for a large model


@dataclass(frozen=True)
class Tactic:
    """An operation, and what each contender for it takes."""

    operation: str
    about: str  # shape and form, for people
    tokens: tuple[int, ...]  # of the calls timed
    microseconds: dict[str, tuple[float, ...]]  # contender → a call, one for each of ``tokens``

    @property
    def winner(self) -> str:
        """Least time over all shapes, each counting alike; the first unless another is clearly faster."""
        first = next(iter(self.microseconds))
        best = min(self.microseconds, key=self._mean)
        return best if self._mean(best) < CLEARLY * self._mean(first) else first

    def _mean(self, contender: str) -> float:
        return math.prod(self.microseconds[contender]) ** (1 / len(self.tokens))

    def as_dict(self) -> dict[str, Any]:
        """For plan.json: the winner is named, for whoever reads it."""
        return {"winner": self.winner, **vars(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Tactic:
        times = {name: tuple(times) for name, times in value["microseconds"].items()}
        return cls(value["operation"], value["about"], tuple(value["tokens"]), times)


def winners(tactics: tuple[Tactic, ...]) -> dict[str, str]:
    """Operation → contender."""
    return {tactic.operation: tactic.winner for tactic in tactics}


def choose(plan: EnginePlan) -> tuple[Tactic, ...]:
    """Time every contender with the plan's head, and its linears in the first layers that have them in each form."""
    with torch.inference_mode(), _all_cores():
        return tuple(map(functools.partial(_timed, plan), _operations(plan)))


def table(tactics: tuple[Tactic, ...]) -> str:
    """For people: a line for each contender, the winner first."""
    lines = [("operation", "tokens", "contender", "µs a call", "times the winner's")]
    for tactic in tactics:
        won, shown = tactic.winner, f"{tactic.operation} {tactic.about}"
        for name in sorted(tactic.microseconds, key=lambda name: (name != won, tactic._mean(name))):
            times = " / ".join(f"{value:,.0f}" for value in tactic.microseconds[name])
            ratio = tactic._mean(name) / tactic._mean(won)
            told = "" if name == won else f"{ratio:.2f}"
            lines.append((shown, " / ".join(map(str, tactic.tokens)), name, times, told))
            shown = ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)


@dataclass(frozen=True)
class _Operation:
    name: str
    about: str
    tokens: tuple[int, ...]
    ways: dict[str, Callable[[int], Callable[[], Any]]]  # contender → what makes a call ready for so many tokens


def _timed(plan: EnginePlan, operation: _Operation) -> Tactic:
    here = [plan.fingerprint["device"], torch.__version__, available_cores(), kernels_digest()]
    key = digest([here, plan.dtype, operation.name, operation.about, operation.tokens, list(operation.ways)])
    if (times := kept("timings", key)) is None:
        device = torch.device(plan.device)
        measured = {
            name: [round(1e6 * best_seconds(ready(tokens), device, _SECONDS, _LEAST), 1) for tokens in operation.tokens]
            for name, ready in operation.ways.items()
        }
        if (times := kept("timings", key)) is None:  # what a build beside this one kept meanwhile is what both tell
            keep("timings", key, times := measured)
    return Tactic(operation.name, operation.about, operation.tokens, {n: tuple(each) for n, each in times.items()})


def _operations(plan: EnginePlan) -> Iterator[_Operation]:
    spec, device, dtype = plan.spec, torch.device(plan.device), plan.torch_dtype
    decodes = tuple(sorted({profile.opt.batch_size for profile in plan.profiles}))
    least = {profile.min.batch_size for profile in plan.profiles} - {1}  # which is nobody's wish
    steps = tuple(sorted({*least, *decodes, *(profile.opt.step_tokens for profile in plan.profiles)}))
    context = max(1, min(plan.profiles[0].opt.seq_len, _MOST_KEYS // decodes[-1]))
    kernels, kept_as = contenders(device, dtype), KV_DTYPES[plan.kv_dtype]

    def each(name: str, about: str, tokens: tuple[int, ...], ready: Callable[[Kernels, int], Callable]) -> _Operation:
        different = {id(getattr(one, name)): n for n, one in reversed(kernels.items())}.values()
        ways = {n: functools.partial(ready, one) for n, one in kernels.items() if n in different}
        return _Operation(name, about, tokens, ways)

    def some(tokens: int, width: int, as_dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(tokens, width, device=device).to(as_dtype)

    def linear(name: str, group: dict[str, torch.Tensor], width: int, tokens: tuple[int, ...]) -> _Operation:
        def ready(make: Callable[[], Linear], tokens: int) -> Callable[[], Any]:
            multiply, x = make(), some(tokens, width)
            if name != "gate_up":
                return lambda: multiply(x)
            out, first = some(tokens, inner), next(iter(kernels.values()))  # the activation is part of it: some fuse it
            if multiply.gated is not None:
                return lambda: multiply.gated(x, out)
            return lambda: first.silu_mul(multiply(x), out)

        form, makes = linear_contenders(group, name)
        ways = {n: functools.partial(ready, functools.cache(make)) for n, make in makes.items()}
        told = "emulated, " if form == "fp8" and not multiplies_fp8(group[f"{name}.fp8"]) else ""
        return _Operation(f"{name}.{form}", f"{told}{len(group[f'{name}.{form}'])}×{width}", tokens, ways)

    def linears(name: str, width: int) -> Iterator[_Operation]:
        for group in _forms(plan, name):
            yield linear(name, {part: tensor.to(device) for part, tensor in group.items()}, width, steps)

    def norm(one: Kernels, tokens: int) -> Callable[[], Any]:
        residual, delta = some(tokens, hidden, torch.float32), some(tokens, hidden)
        weight = torch.ones(hidden, device=device)
        return lambda: one.add_rms_norm(residual, delta, weight, spec.rms_norm_eps, delta)

    def activation(one: Kernels, tokens: int) -> Callable[[], Any]:
        gate_up, out = some(tokens, 2 * inner), some(tokens, inner)
        return lambda: one.silu_mul(gate_up, out)

    def sampling(one: Kernels, rows: int) -> Callable[[], Any]:
        logits, greedy = some(rows, spec.vocab_size), SamplingBatch.greedy(rows)
        return lambda: one.sample(logits, greedy)

    def attention(one: Kernels, sequences: int) -> Callable[[], Any]:
        shape = spec.num_heads, spec.num_kv_heads, spec.head_dim
        made = one.attention(*shape, one.attention.page_size, spec.window, dtype, device, kept_as)
        batch = AttentionBatch.decoding(sequences, context, made.page_size, device)
        [cache] = made.allocate(1, int(batch.page_table.max()) + 1)
        cache.zero_()
        table = spec.rope.cos_sin(spec.head_dim, context).to(device)
        qkv, q = some(sequences, spec.qkv_size), some(sequences, heads)
        out = torch.empty_like(q)

        def call() -> None:
            made.rope_write(qkv, table, batch, cache, None, None, spec.rms_norm_eps, q)
            made.attend(q, batch, cache, out)

        return call

    hidden, inner, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    yield each("add_rms_norm", f"[{hidden}]", steps, norm)
    yield from linears("qkv", hidden)
    told = f"{spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_dim}, context {context}"
    told += f", {plan.kv_dtype} keys and values" if kept_as is not None else ""
    yield each("attention", told, decodes, attention)
    yield from linears("o", heads)
    yield from linears("gate_up", hidden)
    yield each("silu_mul", f"[{inner}]", steps, activation)
    yield from linears("down", inner)
    head = plan.weights("embed" if spec.tied_head else "head")["weight"].to(device)
    yield linear("head", {"head.weight": head}, hidden, decodes)
    yield each("sample", f"[{spec.vocab_size}]", decodes, sampling)


def _forms(plan: EnginePlan, linear: str) -> Iterator[dict[str, torch.Tensor]]:
    """Its tensors, of the first layer that has it in a form, for each form: most plans have but one."""
    seen = set()
    for layer in range(plan.spec.num_layers):
        group = plan.weights(f"layer-{layer:03d}")
        if (form := form_of(group, linear)) not in seen:
            seen.add(form)
            yield {name: tensor for name, tensor in group.items() if name.startswith(f"{linear}.")}


@contextmanager
def _all_cores() -> Iterator[None]:
    """As an engine of one rank computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(available_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def kernels_digest() -> str:
    """Of the code that is timed."""
    home = Path(kernels_home).parent
    return file_digest(sorted(file for file in home.rglob("*") if file.suffix in (".py", ".cpp", ".h")))
