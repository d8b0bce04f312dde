"""Norm and activation in C++, with the signatures of their references."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor


def make_add_rms_norm(operators: ctypes.CDLL, suffix: str) -> Callable[..., Tensor]:
    kernel = getattr(operators, f"add_rms_norm_{suffix}")

    def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        assert residual.is_contiguous() and out.is_contiguous() and (delta is None or delta.is_contiguous())
        tokens, hidden = residual.shape
        kernel(
            residual.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            tokens,
            hidden,
            torch.get_num_threads(),
        )
        return out

    return add_rms_norm


def make_silu_mul(operators: ctypes.CDLL, suffix: str) -> Callable[..., Tensor]:
    kernel = getattr(operators, f"silu_mul_{suffix}")

    def silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
        assert gate_up.is_contiguous() and out.is_contiguous()
        tokens, intermediate = out.shape
        kernel(gate_up.data_ptr(), out.data_ptr(), tokens, intermediate, torch.get_num_threads())
        return out

    return silu_mul
