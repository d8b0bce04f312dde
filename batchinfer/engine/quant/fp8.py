"""FP8 W8A8: e4m3 weights with a scale an output channel (arXiv:2209.05433). Activations are scaled as they come.

A row's scale is its largest magnitude over 448, so one outlier costs its own channel precision and no other.
"""

from __future__ import annotations

from torch import Tensor

from batchinfer.engine.kernels.linear.fp8 import quantize_e4m3


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """float32 ``[N, K]`` → ``fp8`` e4m3 ``[N, K]`` and ``scale`` float32 ``[N]``."""
    fp8, scale = quantize_e4m3(weight)
    return {"fp8": fp8, "scale": scale[:, 0]}
