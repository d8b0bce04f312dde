"""GPTQ (arXiv:2210.17323): columns are rounded one by one, and each passes its error on to those not rounded yet.

What is minimised is the error of the products with the calibration's activations, not of the weights. Columns go in the
order of their activations' size ("act-order") while the groups stay those of neighbours ("static groups"), so that
nothing has to be reordered when the engine runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchinfer.engine.quant.int4 import MOST, Grid
from batchinfer.errors import ModelError

DAMPING = 0.01  # of the mean of the Hessian's diagonal
BLOCK = 128  # columns whose errors are gathered before the rest hears of them
MOST_INPUTS = 16384  # columns that make up for each other: inverting the Hessian of more would take tens of GiB


def quantize(
    weight: Tensor, hessian: Tensor, group: int, *, act_order: bool = True, damping: float = DAMPING
) -> dict[str, Tensor]:
    """float32 ``[N, K]`` → the form ``int4``.

    Args:
        hessian: ``x.T @ x`` of the linear's inputs, float32 ``[K, K]``, to any scale.
    """
    grid = Grid.over(weight, group)

    def nearest(column: Tensor, i: int) -> Tensor:
        step, zero = grid.scale[:, i // group], grid.zero[:, i // group]
        return (((column / step).round() + zero).clamp_(0, MOST) - zero) * step

    return grid.tensors(grid.codes(compensated(weight, hessian, nearest, act_order, damping), group), group)


def compensated(
    weight: Tensor,
    hessian: Tensor,
    nearest: Callable[[Tensor, int], Tensor],
    act_order: bool = True,
    damping: float = DAMPING,
) -> Tensor:
    """float32 ``[N, K]`` rounded so that products with the inputs behind ``hessian`` change least.

    Args:
        nearest: a column ``[N]`` and its place → the closest numbers that it can be.

    Raises:
        ModelError: calibration gave activations that are not finite.
    """
    if not hessian.isfinite().all():
        raise ModelError("activations of the calibration prompts are not finite: try dtype float32, or other prompts")
    parts = torch.arange(weight.shape[1], device=weight.device).chunk(-(-weight.shape[1] // MOST_INPUTS))
    return torch.cat([_together(weight, hessian, nearest, part, act_order, damping) for part in parts], 1)


def _together(
    weight: Tensor,
    hessian: Tensor,
    nearest: Callable[[Tensor, int], Tensor],
    columns: Tensor,
    act_order: bool,
    damping: float,
) -> Tensor:
    """Those columns of the weight, which make up for each other's rounding."""
    order = columns[torch.argsort(hessian.diagonal()[columns], descending=True)] if act_order else columns
    places, inputs = order.tolist(), len(order)
    weight, hessian = weight[:, order], hessian[order[:, None], order]
    diagonal = hessian.diagonal()
    seen = diagonal > 0  # columns of inputs that calibration never saw are rounded by themselves
    diagonal[~seen] = diagonal[seen].mean() if seen.any() else 1.0
    inverse = _inverse_root(hessian, damping)
    rounded = torch.empty_like(weight)
    for first in range(0, inputs, BLOCK):
        block = slice(first, min(first + BLOCK, inputs))
        here, passed_on = weight[:, block], inverse[block, block]
        errors = torch.empty_like(here)
        for i in range(here.shape[1]):
            rounded[:, first + i] = nearest(here[:, i], places[first + i])
            errors[:, i] = (here[:, i] - rounded[:, first + i]) / passed_on[i, i]
            here[:, i:] -= errors[:, i, None] * passed_on[None, i, i:]
        weight[:, block.stop :] -= errors @ inverse[block, block.stop :]
    return torch.empty_like(rounded).index_copy_(1, order - columns[0], rounded)


def _inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular R with R.T @ R the inverse of the damped Hessian. Damped more where that is not enough."""
    while True:
        damped = hessian.double()
        damped.diagonal().add_(damping * damped.diagonal().mean())
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
        if not failed:
            return inverse.float()
        damping *= 10
