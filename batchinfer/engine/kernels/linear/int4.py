"""INT4 weights in groups along K, each with a scale and a zero point; activations are 16 bits wide or more (W4A16)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.kernels.linear.dense import Linear, widened_product


class Int4Linear(Linear):
    """Holds ``int4`` uint8 ``[N, K / 2]``, ``scale`` float32 and ``zero`` uint8 ``[N, groups]`` of ``group`` columns.

    A byte holds two numbers of 0 to 15, the even column in its low half. weight = (int4 - zero) * scale, rounded to
    the dtype of x. The last group may be narrower. With ``order`` int32 ``[K]``, column ``i`` belongs to
    ``x[order[i]]``.
    """

    def __init__(
        self,
        int4: Tensor,
        scale: Tensor,
        zero: Tensor,
        group: Tensor,
        order: Tensor | None = None,
        bias: Tensor | None = None,
        fast: bool = True,
    ) -> None:
        super().__init__(int4, bias)
        self.scale, self.zero, self.order = scale, zero, order
        self.group = int(group)
        self._product = widened_product("int4", int4, scale, zero, self.group) if fast else None
        if self._product is not None:
            self.weight = self.scale = self.zero = None  # kept once, in the layout of the product

    def __call__(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x[:, self.order]
        if self._product is not None:
            return self._product(x, self.bias)
        return F.linear(x, dequantize(self.weight, self.scale, self.zero, self.group).to(x.dtype), self.bias)


def pack(codes: Tensor) -> Tensor:
    """Numbers of 0 to 15, uint8 ``[N, K]`` with even K → ``[N, K / 2]``."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of ``pack``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """float32 ``[N, K]`` that the numbers stand for."""
    codes = unpack(packed)
    wide_scale, wide_zero = (
        values.repeat_interleave(group, dim=1)[:, : codes.shape[1]] for values in (scale, zero.float())
    )
    return (codes.float() - wide_zero) * wide_scale
