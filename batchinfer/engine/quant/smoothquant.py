"""SmoothQuant (arXiv:2211.10438): INT8 weights and activations, with outliers of activations moved into the weights.

How far they are moved (the migration strength) is searched for each linear, "not at all" included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.kernels.linear.int8 import quantize_int8
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.quant import int8
from batchinfer.engine.quant.calibration import Inputs
from batchinfer.engine.quant.fold import Group, fold, shared

STRENGTHS = [step / 20 for step in range(4, 20)]
ROWS = 512  # of the inputs that the search multiplies


def quantize_layer(group: Group, inputs: dict[str, Inputs], spec: DecoderSpec, size: int) -> dict[str, Group]:
    """Scale ``group`` in place and give each linear's form ``w8a8``."""
    for linear in ("o", "down", "qkv", "gate_up"):  # first those whose scale goes into another's rows
        seen, weight = inputs[linear], group[f"{linear}.weight"]
        largest = [shared(values, linear, spec) for values in (seen.most, weight.abs().amax(0))]
        fold(group, linear, search_scale(weight, seen.sample(ROWS), *largest), spec)
    return {linear: int8.quantize_w8a8(group[f"{linear}.weight"]) for linear in inputs}


def search_scale(weight: Tensor, x: Tensor, of_inputs: Tensor, of_weights: Tensor) -> Tensor:
    """float32 ``[K]`` to divide the inputs by, from the largest magnitudes of both sides."""
    wanted = F.linear(x, weight)
    of_inputs, of_weights = of_inputs.clamp(min=1e-5), of_weights.clamp(min=1e-5)
    best, least = torch.ones_like(of_inputs), float("inf")
    powers = (of_inputs**strength / of_weights ** (1 - strength) for strength in STRENGTHS)
    for scale in (best, *(power.clamp(min=1e-5) for power in powers)):
        loss = float((F.linear(_rounded(x / scale), _rounded(weight * scale)) - wanted).square().sum())
        if loss < least:
            best, least = scale, loss
    return best


def _rounded(rows: Tensor) -> Tensor:
    codes, scale = quantize_int8(rows)
    return codes.float() * scale
