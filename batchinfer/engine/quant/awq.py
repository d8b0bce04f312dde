"""AWQ (arXiv:2306.00978): weights that meet large activations are scaled up before rounding, the activations down.

How much (an exponent of the activations' mean size) is searched for each linear, then how far each group's range is
narrowed. Both minimise the error of the products with the calibration's activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.quant.calibration import Inputs
from batchinfer.engine.quant.fold import Group, fold, shared
from batchinfer.engine.quant.int4 import Grid

EXPONENTS = [step / 20 for step in range(20)]
SHRINKS = [1 - step / 20 for step in range(11)]  # of a group's range
UNCLIPPED = ("qkv",)  # queries meet keys in a product of their own, whose error this does not see


def quantize_layer(group: Group, inputs: dict[str, Inputs], spec: DecoderSpec, size: int) -> dict[str, Group]:
    """Scale ``group`` in place and give each linear's form ``int4``."""
    hessians = {}
    for linear in ("o", "down", "qkv", "gate_up"):  # first those whose scale goes into another's rows
        seen = inputs[linear]
        scale = search_scale(group[f"{linear}.weight"], seen, shared(seen.mean, linear, spec), size)
        fold(group, linear, scale, spec)
        hessians[linear] = seen.hessian / scale / scale[:, None]
    made = {}
    for linear, hessian in hessians.items():
        weight = group[f"{linear}.weight"]
        shrink = 1.0 if linear in UNCLIPPED else search_shrink(weight, hessian, size)
        grid = Grid.over(weight, size, shrink)
        made[linear] = grid.tensors(grid.codes(weight, size), size)
    return made


def search_scale(weight: Tensor, inputs: Inputs, mean: Tensor, size: int) -> Tensor:
    """float32 ``[K]``: the power of the inputs' ``mean`` sizes that loses least, 1 where they all are equal."""
    best, least = torch.ones_like(mean), float("inf")
    for exponent in EXPONENTS:
        scale = mean.clamp(min=1e-4) ** exponent
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = Grid.over(weight * scale, size).rounded(weight * scale, size) / scale - weight
        loss = float((error @ inputs.hessian * error).sum())
        if loss < least:
            best, least = scale, loss
    return best


def search_shrink(weight: Tensor, hessian: Tensor, size: int) -> Tensor:
    """float32 ``[N, groups]``: how far to narrow each group's range. Groups are taken as independent."""
    inputs = weight.shape[1]
    size = min(size, inputs)
    missing = -inputs % size
    blocks = F.pad(hessian, (0, missing, 0, missing)).view(-1, size, (inputs + missing) // size, size)
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, size, size]
    best = least = None
    for shrink in SHRINKS:
        error = Grid.over(weight, size, shrink).rounded(weight, size) - weight
        error = F.pad(error, (0, missing)).view(len(weight), -1, size).transpose(0, 1)  # [groups, N, size]
        loss = (error @ blocks * error).sum(-1).T  # [N, groups]
        if best is None:
            best, least = torch.full_like(loss, shrink), loss
        better = loss < least
        best[better], least = shrink, torch.where(better, loss, least)
    return best
