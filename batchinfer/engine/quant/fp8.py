"""FP8 W8A8: e4m3 weights with a scale an output channel (arXiv:2209.05433). Activations are scaled as they come.

A row's scale is its largest magnitude over 448, so one outlier costs its own channel precision and no other. With three
bits of mantissa every weight is up to a sixteenth off, large or small; what that does to the products with the
calibration's activations, columns not rounded yet make up for, as in GPTQ. Moving size from one channel to another, as
for integers, would gain nothing: a number's error is a share of the number.
"""

from __future__ import annotations

from torch import Tensor

from batchinfer.engine.kernels.linear.fp8 import E4M3, MOST, quantize_e4m3
from batchinfer.engine.quant.gptq import compensated


def quantize(weight: Tensor, hessian: Tensor | None = None) -> dict[str, Tensor]:
    """float32 ``[N, K]`` → ``fp8`` e4m3 ``[N, K]`` and ``scale`` float32 ``[N]``.

    Args:
        hessian: ``x.T @ x`` of the linear's inputs, float32 ``[K, K]``, to any scale; None rounds to nearest.
    """
    fp8, scale = quantize_e4m3(weight)
    scale = scale[:, 0]
    if hessian is not None:

        def nearest(column: Tensor, _: int) -> Tensor:
            return _e4m3(column / scale).float() * scale

        fp8 = _e4m3(compensated(weight, hessian, nearest) / scale[:, None])
    return {"fp8": fp8, "scale": scale}


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-MOST, MOST).to(E4M3)
