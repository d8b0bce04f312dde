"""W8A8 in e4m3: weights with a scale an output channel, activations with a scale a token, found as they come.

Both scales lie outside the sum over K, so the product itself runs on 8-bit numbers: natively on GPUs of compute
capability 8.9 and above, emulated elsewhere with the same numbers in a wider type.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from batchinfer.engine.kernels.linear.dense import Linear, widened_product

E4M3 = torch.float8_e4m3fn
MOST = 448.0  # the largest e4m3 number
_ALIGNED = 16  # K and N of the native product must be multiples
_FEW = 256  # rows up to which the native product is faster without scales of rows and columns, which the library
# applies in kernels that do not cut sums to fill the card
_HOW = dict(out_dtype=torch.bfloat16, use_fast_accum=True)


class Unscaled(NamedTuple):
    """A product yet to be multiplied by a scale a row and a scale a column: who reads it does so in passing."""

    values: Tensor  # bfloat16 [T, N]
    rows: Tensor  # float32 [T, 1]
    columns: Tensor  # float32 [1, N]


class Fp8Linear(Linear):
    """Holds ``fp8`` e4m3 ``[N, K]`` and ``scale`` float32 ``[N]``: weight = fp8 * scale[:, None].

    Not ``fast``, here and in the forms beside: by torch alone, from numbers that are widened in every call.
    """

    input_dtype: ClassVar[torch.dtype | None] = E4M3

    def __init__(self, fp8: Tensor, scale: Tensor, bias: Tensor | None = None, fast: bool = True) -> None:
        super().__init__(fp8, bias)
        self.scale = scale[None]  # [1, N]
        self._one = torch.ones(1, dtype=torch.float32, device=fp8.device)
        self.native = fast and multiplies_fp8(fp8)
        self._product = widened_product("fp8", fp8, scale[:, None]) if fast else None
        if self._product is not None:
            self.weight = None  # kept once, in the layout of the product

    def __call__(self, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
        """
        Args:
            x: ``dtype[T, K]``; with ``x_scale`` float32 ``[T, 1]`` e4m3, and the result is bfloat16.
        """
        dtype = x.dtype if x_scale is None else torch.bfloat16
        if x_scale is None:
            x, x_scale = quantize_e4m3(x)
        if self.native:
            y = torch._scaled_mm(x, self.weight.t(), x_scale, self.scale, **_HOW).to(dtype)
        elif self._product is not None:
            y = (self._product(x.to(dtype), None) * x_scale).to(dtype)
        else:
            y = (torch.nn.functional.linear(x.to(dtype), self.weight.to(dtype)) * x_scale * self.scale).to(dtype)
        return y if self.bias is None else y.add_(self.bias)

    def unscaled(self, x: Tensor, x_scale: Tensor) -> Tensor | Unscaled:
        """The product for a kernel that takes either: without its scales where that is faster."""
        if not self.native or self.bias is not None or len(x) > _FEW:
            return self(x, x_scale)
        return Unscaled(torch._scaled_mm(x, self.weight.t(), self._one, self._one, **_HOW), x_scale, self.scale)


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over its own scale: e4m3 ``[T, K]`` and float32 ``[T, 1]``, so that x ≈ quantised * scale."""
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / MOST).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scale).clamp_(-MOST, MOST).to(E4M3), scale


def multiplies_fp8(weight: Tensor) -> bool:
    """Whether the device of ``weight`` multiplies it as it is."""
    return has_fp8(weight.device) and not any(size % _ALIGNED for size in weight.shape)


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 numbers itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
