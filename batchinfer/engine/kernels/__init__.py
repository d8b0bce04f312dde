"""One module an operation: its contract, a torch reference, and the fast implementations beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchinfer.engine.kernels.activation import silu_mul
from batchinfer.engine.kernels.attention import KV_DTYPES, AttentionBatch, PagedAttention, TorchPagedAttention
from batchinfer.engine.kernels.norm import add_rms_norm
from batchinfer.engine.kernels.sampling import SamplingBatch, sample

__all__ = ["KV_DTYPES", "AttentionBatch", "Kernels", "PagedAttention", "SamplingBatch", "contenders", "select"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of one device and dtype; each keeps the contract of the reference of the same name."""

    name: str
    add_rms_norm: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    attention: type[PagedAttention]
    sample: Callable[[Tensor, SamplingBatch], Tensor]
    # Of a tensor into e4m3 and a scale a row. None: norm and activation do not quantise in passing either, linears see
    # to it themselves.
    quantize: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    # Of layers that make one call, see ``cpu.layers``; gives None for those that it cannot take.
    fuse: Callable[..., Callable[..., Tensor] | None] | None = None


OPERATIONS = ("add_rms_norm", "silu_mul", "attention", "sample")
TORCH = Kernels("torch", add_rms_norm, silu_mul, TorchPagedAttention, sample)


def contenders(device: torch.device, dtype: torch.dtype) -> dict[str, Kernels]:
    """All kernels that work here, by name: those that are likely to be fastest first.

    On GPUs the torch references are none: they quantise nothing in passing and cannot be recorded.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return {"torch": TORCH}
    if device.type == "cuda":
        from batchinfer.engine.kernels.gpu import KERNELS

        return {"own": KERNELS}
    from batchinfer.engine.kernels.cpu import kernels  # compiles on first use

    own = kernels(dtype)
    if own is None:
        return {"torch": TORCH}
    # What the reference of attention gives depends on which rows share a call, ever so slightly: none of ours does.
    return {"own": own, "torch": replace(TORCH, attention=own.attention)}


def select(device: torch.device, dtype: torch.dtype, winners: Mapping[str, str] | None = None) -> Kernels:
    """The kernels to use here.

    Args:
        winners: operation → contender; for what is not named, or does not work here, the one likely to be fastest.
    """
    known = contenders(device, dtype)
    first, winners = next(iter(known.values())), winners or {}
    chosen = {name: known[winners[name]] for name in OPERATIONS if winners.get(name) in known}
    picked = replace(first, **{name: getattr(kernels, name) for name, kernels in chosen.items()})
    in_layers = (picked.add_rms_norm, picked.attention) == (first.add_rms_norm, first.attention)
    return picked if in_layers else replace(picked, fuse=None)
