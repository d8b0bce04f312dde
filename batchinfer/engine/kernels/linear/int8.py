"""INT8 with a scale an output channel: weights alone (W8A16), or activations as well, a scale a token (W8A8)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.kernels.linear.dense import Linear, gates, widened_product

MOST = 127  # magnitudes are symmetric: -128 is not used
_ALIGNED, _FEWEST_ROWS = 8, 32  # what torch's own int8 product asks of a GPU


class Int8Linear(Linear):
    """Holds ``int8`` ``[N, K]``, ``scale`` float32 ``[N]``; activations stay as they are."""

    def __init__(self, int8: Tensor, scale: Tensor, bias: Tensor | None = None, fast: bool = True) -> None:
        super().__init__(int8, bias)
        self.scale = scale
        self._product = widened_product("int8", int8, scale[:, None]) if fast else None
        if self._product is not None:
            self.weight = None  # kept once, in the layout of the product

    def __call__(self, x: Tensor) -> Tensor:
        if self._product is not None:
            return self._product(x, self.bias)
        y = (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


class W8A8Linear(Linear):
    """Holds ``w8a8`` int8 ``[N, K]`` and ``scale`` float32 ``[N]``; the product is one of integers, and exact."""

    input_dtype: ClassVar[torch.dtype | None] = torch.int8

    def __init__(self, w8a8: Tensor, scale: Tensor, bias: Tensor | None = None, fast: bool = True) -> None:
        super().__init__(w8a8, bias)
        self.scale = scale
        if fast and w8a8.device.type == "cpu":
            from batchinfer.engine.kernels.cpu import linear as cpu

            if cpu.operators() is not None:
                self.product = cpu.W8A8Product(w8a8, scale, bias)
                self.weight = None  # kept once, in the layout of the product
                if gates(w8a8):
                    self.gated = self.product.gated

    def __call__(self, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
        """
        Args:
            x: ``dtype[T, K]``; with ``x_scale`` float32 ``[T, 1]`` int8, and the result is bfloat16.
        """
        if self.product is not None:
            x = x if x_scale is None else (x.float() * x_scale).bfloat16()
            return self.product(x)
        dtype = x.dtype if x_scale is None else torch.bfloat16
        if x_scale is None:
            x, x_scale = quantize_int8(x)
        y = (_integer_product(x, self.weight).float() * x_scale * self.scale).to(dtype)
        return y if self.bias is None else y.add_(self.bias)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over its own scale: int8 ``[T, K]`` and float32 ``[T, 1]``, so that x ≈ quantised * scale."""
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / MOST).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round_().clamp_(-MOST, MOST).to(torch.int8), scale


def _integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """int32 ``[T, N]``. A GPU's product wants aligned sizes and many rows: padded with zeros to what it takes."""
    if x.device.type == "cpu":
        return torch._int_mm(x, weight.t())
    rows, inputs = x.shape
    missing, ragged, extra = max(0, _FEWEST_ROWS - rows), -inputs % _ALIGNED, -len(weight) % _ALIGNED
    if missing or ragged or extra:
        x, weight = F.pad(x, (0, ragged, 0, missing)), F.pad(weight, (0, ragged, 0, extra))
    return torch._int_mm(x, weight.t())[:rows, : weight.shape[0] - extra]
