"""Residual add and RMSNorm (arXiv:1910.07467) in one pass over the residual stream."""

from __future__ import annotations

from torch import Tensor


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """``residual += delta``, then ``out = residual * rsqrt(mean(residual²) + eps) * weight``.

    Args:
        residual: float32 ``[tokens, hidden]``, updated in place.
        delta: what the last block adds, in the model's dtype, ``[tokens, hidden]``; None at the first norm.
        weight: float32 ``[hidden]``.
        eps: added to the mean square.
        out: the model's dtype, ``[tokens, hidden]``; it may be ``delta`` itself.
    """
    if delta is not None:
        residual.add_(delta)
    scale = residual.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return out.copy_(residual * scale * weight)
