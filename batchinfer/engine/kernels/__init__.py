"""One module an operation: its contract, a torch reference, and the fast implementations beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.engine.kernels.activation import silu_mul
from batchinfer.engine.kernels.attention import AttentionBatch, PagedAttention, TorchPagedAttention
from batchinfer.engine.kernels.norm import add_rms_norm
from batchinfer.engine.kernels.sampling import SamplingBatch, sample

__all__ = ["AttentionBatch", "Kernels", "PagedAttention", "SamplingBatch", "select"]


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


TORCH = Kernels("torch", add_rms_norm, silu_mul, TorchPagedAttention, sample)


def select(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels that work here; the torch references where nothing faster does."""
    if dtype not in (torch.float32, torch.bfloat16):
        return TORCH
    if device.type == "cuda":
        from batchinfer.engine.kernels.gpu import KERNELS

        return KERNELS
    from batchinfer.engine.kernels.cpu import kernels  # compiles on first use

    return kernels(dtype) or TORCH
