"""Norm, activation and FP8 quantisation in Triton: one program a row, one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from batchinfer.engine.kernels.linear.fp8 import Unscaled

MOST = tl.constexpr(448.0)  # the largest e4m3 number
LEAST = tl.constexpr(1e-30)  # of scales, for rows of zeros


@triton.jit
def _store_quantised(out, scales, row, column, values, WIDTH: tl.constexpr):
    scale = tl.maximum(tl.max(tl.abs(values), 0) / MOST, LEAST)
    tl.store(scales + row, scale)
    values = tl.clamp(values / scale, -MOST, MOST)
    tl.store(out + row * WIDTH + column, values.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _add_rms_norm(
    residual, delta, delta_rows, delta_columns, weight, out, scales, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, QUANTISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    x = tl.load(residual + row * WIDTH + column, mask=mask, other=0.0)
    if ADD:
        more = tl.load(delta + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            more *= tl.load(delta_rows + row) * tl.load(delta_columns + column, mask=mask, other=0.0)
        x += more
        tl.store(residual + row * WIDTH + column, x, mask=mask)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    normed = x * inverse * tl.load(weight + column, mask=mask, other=0.0)
    if QUANTISE:
        _store_quantised(out, scales, row, column, normed, WIDTH)
    else:
        tl.store(out + row * WIDTH + column, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul(gate_up, out, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUANTISE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate_up += row * 2 * WIDTH
    gate = tl.load(gate_up + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    values = gate / (1.0 + tl.exp(-gate)) * up
    if QUANTISE:
        _store_quantised(out, scales, row, column, values, WIDTH)
    else:
        tl.store(out + row * WIDTH + column, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _quantize(x, out, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    _store_quantised(out, scales, row, column, values, WIDTH)


def _warps(width: int) -> int:
    """Warps of a program that holds a row of ``width`` in registers."""
    return max(1, min(16, triton.next_power_of_2(width) // 512))


def in_parts(product: Tensor | Unscaled | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The numbers of a product, and the scales of its rows and columns where they are not in it yet."""
    return product if isinstance(product, Unscaled) else (product, None, None)


def add_rms_norm(
    residual: Tensor,
    delta: Tensor | Unscaled | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    rows, width = residual.shape
    delta, delta_rows, delta_columns = in_parts(delta)
    assert residual.is_contiguous() and out.is_contiguous() and (delta is None or delta.is_contiguous())
    _add_rms_norm[(rows,)](
        residual, delta, delta_rows, delta_columns, weight, out, scale, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADD=delta is not None, SCALE=delta_rows is not None,
        QUANTISE=scale is not None, num_warps=_warps(width),
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor, out: Tensor, scale: Tensor | None = None) -> Tensor:
    rows, width = out.shape
    assert gate_up.is_contiguous() and out.is_contiguous()
    _silu_mul[(rows,)](
        gate_up, out, scale,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), QUANTISE=scale is not None, num_warps=_warps(width),
    )  # fmt: skip
    return out


def quantize(x: Tensor, out: Tensor, scale: Tensor) -> Tensor:
    rows, width = x.shape
    assert x.is_contiguous() and out.is_contiguous()
    _quantize[(rows,)](x, out, scale, WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width))
    return out
