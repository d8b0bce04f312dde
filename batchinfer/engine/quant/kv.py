"""Keys and values in 8 bits: a scale for each KV head, calibrated, and folded into the matrices on either side.

A key divided by its head's scale meets queries multiplied by it, and where values are divided, columns of ``o`` are
multiplied. No product changes, and what the cache keeps needs no scale beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.kernels.linear.fp8 import MOST as FP8_MOST
from batchinfer.engine.kernels.linear.int8 import MOST as INT8_MOST
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.quant.calibration import Inputs
from batchinfer.engine.quant.fold import Group

# What the largest of calibration becomes. e4m3 is as precise there as anywhere, so it leaves room for what is larger.
TARGETS = {"int8": INT8_MOST, "fp8": FP8_MOST / 4}


def fold(group: Group, inputs: dict[str, Inputs], spec: DecoderSpec, target: float) -> dict[str, Inputs]:
    """Scale a layer in place, so that the keys and values of calibration fill ±``target``.

    Returns: what the scaled layer's linears are fed.
    """
    keys, values = largest(group, inputs["qkv"], spec)
    heads, group_of = spec.num_heads, spec.num_heads // spec.num_kv_heads
    key_scale, value_scale = ((most / target).clamp(min=torch.finfo(torch.float32).tiny) for most in (keys, values))
    rows = torch.ones(heads + 2 * spec.num_kv_heads, device=keys.device)
    rows[heads + spec.num_kv_heads :] = 1 / value_scale
    if "k_norm.weight" in group:  # it comes after the matrix, and all heads share it
        group["k_norm.weight"] = group["k_norm.weight"] / key_scale.max()
        group["q_norm.weight"] = group["q_norm.weight"] * key_scale.max()
    else:
        rows[heads : heads + spec.num_kv_heads] = 1 / key_scale
        rows[:heads] = key_scale.repeat_interleave(group_of)
    rows = rows.repeat_interleave(spec.head_dim)
    group["qkv.weight"] = group["qkv.weight"] * rows[:, None]
    if "qkv.bias" in group:
        group["qkv.bias"] = group["qkv.bias"] * rows
    columns = value_scale.repeat_interleave(group_of * spec.head_dim)
    group["o.weight"] = group["o.weight"] * columns
    return inputs | {"o": Inputs([chunk / columns.to(chunk.dtype) for chunk in inputs["o"].chunks])}


def largest(group: Group, inputs: Inputs, spec: DecoderSpec) -> tuple[Tensor, Tensor]:
    """Magnitudes of keys and of values, float32 ``[kv_heads]`` each; of keys for whatever position they are rotated."""
    first = spec.num_heads * spec.head_dim
    weight, bias = group["qkv.weight"][first:], group.get("qkv.bias")
    keys, values = [], []
    for chunk in inputs.chunks:
        made = F.linear(chunk.float(), weight, bias if bias is None else bias[first:])
        k, v = made.view(len(chunk), 2, spec.num_kv_heads, spec.head_dim).unbind(1)
        if "k_norm.weight" in group:
            k = F.rms_norm(k, k.shape[-1:], group["k_norm.weight"], spec.rms_norm_eps)
        keys.append(torch.hypot(*k.chunk(2, dim=-1)).amax((0, 2)))
        values.append(v.abs().amax((0, 2)))
    return torch.stack(keys).amax(0), torch.stack(values).amax(0)
