"""Layers of a decoder in one call; what they compute is what the operators do one after another."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchinfer.engine.kernels.attention import AttentionBatch
from batchinfer.engine.kernels.cpu.attention import CpuPagedAttention
from batchinfer.engine.kernels.cpu.library import library
from batchinfer.engine.kernels.cpu.linear import Matrix, Product

if TYPE_CHECKING:
    from batchinfer.engine.model.decoder import Layer

_VECTORS = ("attn_norm", "q_norm", "k_norm", "mlp_norm")
_MATRICES = ("qkv", "o", "gate_up", "down")


class CpuLayers:
    """Layers whose products are all our own, bfloat16 or W8A8."""

    def __init__(self, layers: list[Layer], attention: CpuPagedAttention, max_tokens: int, eps: float) -> None:
        self._held = layers
        self._attention = attention
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._layers_at = ctypes.addressof(self._layers)
        self._caches: list[Tensor] | None = None
        first = self._layers[0]
        heads = attention.num_heads * attention.head_dim
        widths = {"normed": first.qkv.k, "qkv": first.qkv.n, "q": heads, "attended": heads}
        widths |= {"activated": first.down.k, "delta": first.qkv.k}
        self._rooms = {name: torch.empty(max_tokens, width, dtype=torch.bfloat16) for name, width in widths.items()}
        self._step = _Step(eps=eps, **{name: room.data_ptr() for name, room in self._rooms.items()})
        self._step_at = ctypes.addressof(self._step)
        self._run = library().layers_bf16_int8 if attention.kv_dtype == torch.int8 else library().layers_bf16

    def __call__(self, residual: Tensor, cos_sin: Tensor, batch: AttentionBatch, caches: list[Tensor]) -> Tensor:
        """Run a step through the layers.

        Args:
            residual: float32 ``[tokens, hidden]``, gets what each layer adds, but for what the last one's MLP does.
            caches: one of each layer.

        Returns:
            What the last one's MLP adds, bfloat16 ``[tokens, hidden]``, until the next call.
        """
        assert residual.is_contiguous() and residual.dtype == torch.float32
        if self._caches is not caches:
            for layer, cache in zip(self._layers, caches):
                layer.cache = cache.data_ptr()
            self._caches = caches
        self._step.residual, self._step.cos_sin = residual.data_ptr(), cos_sin.data_ptr()
        shape, at = self._attention.shape_at, self._attention.batch_at(batch)
        self._run(self._layers_at, len(self._layers), shape, at, self._step_at, torch.get_num_threads())
        return self._rooms["delta"][: len(residual)]


def fuse(layers: list[Layer], attention: CpuPagedAttention, max_tokens: int, eps: float) -> CpuLayers | None:
    """The layers in one call; None where there is none for them."""
    linears = [getattr(layer, name) for layer in layers for name in _MATRICES]
    if not linears or attention.dtype != torch.bfloat16:
        return None
    ours = all(isinstance(linear.product, Product) for linear in linears)
    gated = all(layer.gate_up.gated is not None for layer in layers)
    return CpuLayers(layers, attention, max_tokens, eps) if ours and gated else None


def _layer(layer: Layer) -> _Layer:
    vectors = {name: getattr(layer, name) for name in _VECTORS}
    pointers = {name: None if vector is None else vector.data_ptr() for name, vector in vectors.items()}
    return _Layer(**pointers, **{name: getattr(layer, name).product.matrix for name in _MATRICES})


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _VECTORS),
        *((name, Matrix) for name in _MATRICES),
        ("cache", ctypes.c_void_p),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos_sin", "residual")),
        *((name, ctypes.c_void_p) for name in ("normed", "qkv", "q", "attended", "activated", "delta")),
        ("eps", ctypes.c_float),
    )
