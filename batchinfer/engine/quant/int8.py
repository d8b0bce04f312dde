"""INT8, round to nearest: each output channel over its largest magnitude."""

from __future__ import annotations

from torch import Tensor

from batchinfer.engine.kernels.linear.int8 import quantize_int8


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """float32 ``[N, K]`` → ``int8`` ``[N, K]`` and ``scale`` float32 ``[N]``."""
    int8, scale = quantize_int8(weight)
    return {"int8": int8, "scale": scale[:, 0]}


def quantize_w8a8(weight: Tensor) -> dict[str, Tensor]:
    """The same numbers, for activations of 8 bits too."""
    int8, scale = quantize_int8(weight)
    return {"w8a8": int8, "scale": scale[:, 0]}
