"""SwiGLU's gate (arXiv:2002.05202): SiLU of one half of a row times the other half."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
    """``out = silu(gate) * up``, computed in float32.

    Args:
        gate_up: the model's dtype, ``[tokens, 2 * intermediate]``, gate first.
        out: the model's dtype, ``[tokens, intermediate]``.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return out.copy_(F.silu(gate) * up)
