"""Norm and activation against their references."""

from __future__ import annotations

import pytest
import torch

from batchinfer.engine.kernels import activation, norm


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 15), (2, 16), (64, 576), (5, 577), (130, 1031)])
@pytest.mark.parametrize("first", [True, False])
def test_add_rms_norm(kernels, dtype, tolerance, tokens, hidden, first):
    residual, weight = torch.randn(tokens, hidden), torch.rand(hidden) + 0.5
    delta = None if first else torch.randn(tokens, hidden).to(dtype)
    copy, poison = residual.clone(), torch.full((tokens, hidden), float("nan"), dtype=dtype)
    expected = norm.add_rms_norm(copy, delta, weight, 1e-5, poison.clone())
    got = kernels.add_rms_norm(residual, delta, weight, 1e-5, poison)
    assert got is poison
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(residual, copy, rtol=0, atol=0)


def test_add_rms_norm_may_write_over_delta(kernels, dtype, tolerance):
    residual, weight, delta = torch.randn(4, 100), torch.rand(100), torch.randn(4, 100).to(dtype)
    expected = norm.add_rms_norm(residual.clone(), delta, weight, 1e-5, torch.empty_like(delta))
    torch.testing.assert_close(kernels.add_rms_norm(residual, delta, weight, 1e-5, delta), expected, **tolerance)


@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (3, 15), (64, 1536), (5, 1537)])
def test_silu_mul(kernels, dtype, tolerance, tokens, size):
    gate_up = (torch.randn(tokens, 2 * size) * 8).to(dtype)
    gate_up[0, 0] = -200  # exp(200) is not a float
    expected = activation.silu_mul(gate_up, torch.empty(tokens, size, dtype=dtype))
    got = kernels.silu_mul(gate_up, torch.full((tokens, size), float("nan"), dtype=dtype))
    torch.testing.assert_close(got, expected, **tolerance)
