"""Unquantised weights, kept in the layout that their device multiplies fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

# The number of rows that oneDNN chooses the packed layout for: a decode step of a good batch.
_PACK_ROWS = 128


class Linear:
    """Holds weight ``dtype[N, K]`` and bias ``dtype[N]`` as given: torch chooses the product."""

    # What activations are quantised to, a scale a token; None: they are taken as they come. Such a linear also takes
    # them quantised already, so that whoever computes them can do it in passing: ``linear(x_fp8, x_scale [T, 1])``.
    input_dtype: ClassVar[torch.dtype | None] = None

    # x ``[T, K]``, out ``[T, N / 2]``: SwiGLU's silu(first half of the channels) * second half, computed with the
    # product; None where that takes a pass of its own.
    gated: Callable[[Tensor, Tensor], Tensor] | None = None

    # x ``[T, K]``, out ``[T, N]``: the product, written there; None where it makes its own room.
    into: Callable[[Tensor, Tensor], Tensor] | None = None

    product: Callable[..., Tensor] | None = None  # who computes it, if not torch

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def rows(self, channels: Tensor) -> Tensor:
        """Those rows of the weight, ``dtype[len(channels), K]``; the method is None where they cannot be read."""
        return self.weight[channels]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class BlockedLinear(Linear):
    """bfloat16 by our own product, see ``cpu.linear``: faster than oneDNN's on AVX512-BF16."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        from batchinfer.engine.kernels.cpu.linear import BFloat16Product

        super().__init__(None, bias)  # kept once, in the layout of the product
        self.product = BFloat16Product(weight, bias)
        self.into = self.product.into
        if gates(weight):
            self.gated = self.product.gated

    def rows(self, channels: Tensor) -> Tensor:
        return self.product.rows(channels)

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)


class PackedLinear(Linear):
    """bfloat16 on a CPU: oneDNN's blocked layout, packed once, 1.3 to 1.9 times faster at decode batches."""

    rows = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS), bias)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, self.bias, "none", [], "")


def dense(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The Linear that is likely to be fastest where ``weight`` lies."""
    return next(iter(dense_contenders(weight).values()))(weight, bias)


def dense_contenders(weight: Tensor) -> dict[str, Callable[..., Linear]]:
    """All that work where ``weight`` lies, those that are likely to be fastest first."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return {"torch": Linear}
    from batchinfer.engine.kernels.cpu import linear as cpu

    packs = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ways: dict[str, Callable[..., Linear]] = {"onednn": PackedLinear, "torch": Linear} if packs else {"torch": Linear}
    if not own_products() or weight.shape[1] % 2:
        return ways
    own = {"own": BlockedLinear}
    return own | ways if cpu.operators().best_bf16() else ways | own


def own_products() -> bool:
    """Whether the CPU's products of our own work here."""
    from batchinfer.engine.kernels.cpu import linear as cpu

    return cpu.operators() is not None


def gates(weight: Tensor) -> bool:
    """Whether the halves of the channels are whole blocks of the CPU's products."""
    return weight.shape[0] % 32 == 0


def widened_product(
    form: str, weight: Tensor, scale: Tensor, zero: Tensor | None = None, group: int = 0
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """The CPU's product with weights in fewer bits, see ``cpu.linear.WidenedProduct``; None where there is none."""
    if weight.device.type != "cpu":
        return None
    from batchinfer.engine.kernels.cpu import linear as cpu

    return cpu.WidenedProduct(form, weight, scale, zero, group) if own_products() else None
