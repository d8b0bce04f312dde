"""Scales between neighbours: an input channel is made smaller where it is made, and its weights larger.

The product stays the same, and which of the two sides loses more by rounding changes: AWQ and SmoothQuant live by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.engine.model.spec import DecoderSpec

Group = dict[str, Tensor]


def fold(group: Group, linear: str, scale: Tensor, spec: DecoderSpec) -> None:
    """Divide the inputs of ``linear`` by ``scale`` float32 ``[K]`` and multiply its weight by it, in place.

    The scale of ``o`` must be ``shared`` among the queries of a KV head.
    """
    assert torch.allclose(scale, shared(scale, linear, spec), rtol=1e-4), "queries of a KV head share their scale"
    group[f"{linear}.weight"] = group[f"{linear}.weight"] * scale
    if linear in ("qkv", "gate_up"):
        norm = "attn_norm.weight" if linear == "qkv" else "mlp_norm.weight"
        group[norm] = group[norm] / scale
        return
    maker, rows = ("gate_up", slice(spec.intermediate_size, None))
    if linear == "o":
        maker, rows = "qkv", slice((spec.num_heads + spec.num_kv_heads) * spec.head_dim, None)
        scale = scale.view(spec.num_kv_heads, -1, spec.head_dim)[:, 0].flatten()
    for part in ("weight", "bias"):
        if f"{maker}.{part}" in group:
            made = group[f"{maker}.{part}"].clone()
            made[rows] /= scale[:, None] if part == "weight" else scale
            group[f"{maker}.{part}"] = made


def shared(values: Tensor, linear: str, spec: DecoderSpec) -> Tensor:
    """Statistics ``[K]`` of the inputs of ``linear``, the largest for all that one scale must serve."""
    if linear != "o":
        return values
    heads = values.view(spec.num_kv_heads, -1, spec.head_dim)
    return heads.amax(1, keepdim=True).expand_as(heads).flatten()
