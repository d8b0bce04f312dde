"""Weights: a model's tensors one by one, under the names and in the fused layout of the engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from batchinfer.engine.model.quantized import QuantizedCheckpoint
from batchinfer.engine.model.source import ModelSource
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.errors import ModelError

# engine name → the Hugging Face tensors that are stacked to make it, in this order
_LAYER_TENSORS = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm.weight": ("self_attn.q_norm.weight",),
    "k_norm.weight": ("self_attn.k_norm.weight",),
    "o.weight": ("self_attn.o_proj.weight",),
    "o.bias": ("self_attn.o_proj.bias",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "gate_up.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "down.weight": ("mlp.down_proj.weight",),
    "down.bias": ("mlp.down_proj.bias",),
}
# Hugging Face name → GGUF name (llama.cpp's constants.py)
_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def layer_tensor_names(spec: DecoderSpec) -> list[str]:
    """Engine names of one layer's tensors, those that the spec has."""
    absent = set()
    absent |= set() if spec.qkv_bias else {"qkv.bias"}
    absent |= set() if spec.o_bias else {"o.bias"}
    absent |= set() if spec.mlp_bias else {"gate_up.bias", "down.bias"}
    absent |= set() if spec.qk_norm else {"q_norm.weight", "k_norm.weight"}
    return [name for name in _LAYER_TENSORS if name not in absent]


def convert(
    source: ModelSource, spec: DecoderSpec, dtype: torch.dtype, layer_dtype: torch.dtype | None = None
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield the model group by group (``embed``, ``layer-000`` …, ``head``), each a dict of engine tensors.

    Matrices and biases come in ``dtype``, those of layers in ``layer_dtype`` if given; norm weights in float32. Only
    one group is held in memory at a time.

    Raises:
        ModelError: a tensor is missing or has another shape than the config says.
    """
    tensors = open_tensors(source, spec)
    quantized = open_quantized(source, tensors)

    def get(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = tensors.get(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{source.name}: {name} has shape {list(tensor.shape)}, the config says {list(shape)}")
        return tensor.to(dtype)

    hidden = spec.hidden_size
    yield "embed", {"weight": get("model.embed_tokens.weight", (spec.vocab_size, hidden))}
    for layer in range(spec.num_layers):
        group = {}
        for name in layer_tensor_names(spec):
            if quantized is not None and name in _MATRICES:
                group |= _quantized_matrix(quantized, spec, layer, name, layer_dtype or dtype)
                continue
            parts = [tensors.get(f"model.layers.{layer}.{part}") for part in _LAYER_TENSORS[name]]
            stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
            if tuple(stacked.shape) != (expected := _shape(spec, name)):
                raise ModelError(
                    f"{source.name}: layer {layer} {name} has shape {list(stacked.shape)}, "
                    f"the config says {list(expected)}"
                )
            group[name] = stacked.to(torch.float32 if "norm" in name else layer_dtype or dtype).contiguous()
        yield f"layer-{layer:03d}", group
    head = {"norm.weight": tensors.get("model.norm.weight").float()}
    if not spec.tied_head:
        head["weight"] = get("lm_head.weight", (spec.vocab_size, hidden))
    yield "head", head


def open_quantized(source: ModelSource, tensors: SafetensorsTensors) -> QuantizedCheckpoint | None:
    """What reads the layers of a checkpoint that comes quantised; None for any other."""
    config = quantization_of(source)
    return QuantizedCheckpoint(config, tensors) if config else None


def quantization_of(source: ModelSource) -> dict[str, Any] | None:
    """A checkpoint's own account of how it is quantised."""
    return None if source.gguf else source.config().get("quantization_config")


_MATRICES = ("qkv.weight", "o.weight", "gate_up.weight", "down.weight")


def _quantized_matrix(
    quantized: QuantizedCheckpoint, spec: DecoderSpec, layer: int, name: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    names = [f"model.layers.{layer}.{part.removesuffix('.weight')}" for part in _LAYER_TENSORS[name]]
    parts = quantized.linear(names)
    [form] = parts.keys() & {"weight", "int4", "int8", "w8a8", "fp8"}
    rows, columns = parts[form].shape
    shape = (rows, columns * 2 if form == "int4" else columns)
    if shape != (expected := _shape(spec, name)):
        raise ModelError(f"{', '.join(names)} have shape {list(shape)}, the config says {list(expected)}")
    if form == "weight":
        parts["weight"] = parts["weight"].to(dtype)
    return {f"{name.removesuffix('.weight')}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def _shape(spec: DecoderSpec, name: str) -> tuple[int, ...]:
    hidden, inner, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    return {
        "attn_norm.weight": (hidden,),
        "qkv.weight": (spec.qkv_size, hidden),
        "qkv.bias": (spec.qkv_size,),
        "q_norm.weight": (spec.head_dim,),
        "k_norm.weight": (spec.head_dim,),
        "o.weight": (hidden, heads),
        "o.bias": (hidden,),
        "mlp_norm.weight": (hidden,),
        "gate_up.weight": (2 * inner, hidden),
        "gate_up.bias": (2 * inner,),
        "down.weight": (hidden, inner),
        "down.bias": (hidden,),
    }[name]


class Tensors(Protocol):
    """Tensors by Hugging Face name, read when asked for."""

    def get(self, name: str) -> torch.Tensor: ...


def open_tensors(source: ModelSource, spec: DecoderSpec) -> Tensors:
    return GgufTensors(source, spec) if source.gguf else SafetensorsTensors(source)


class SafetensorsTensors:
    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._home = {}
        for file in source.weight_files():
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is not a readable safetensors file: {error}") from None
            self._home |= dict.fromkeys(opened.keys(), opened)

    def has(self, name: str) -> bool:
        return name in self._home

    def get(self, name: str) -> torch.Tensor:
        if name not in self._home:
            raise ModelError(f"{self._source.folder} has no tensor {name}: the weights do not match config.json")
        return self._home[name].get_tensor(name)


class GgufTensors:
    """Dequantised GGUF tensors, float32. GGUF stores rotary weights of the llama family interleaved; undone here."""

    def __init__(self, source: ModelSource, spec: DecoderSpec) -> None:
        from gguf import GGUFReader

        self._spec = spec
        self._source = source
        reader = GGUFReader(source.gguf)
        architecture = reader.get_field("general.architecture").contents()
        self._interleaved = architecture == "llama"
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        # transformers reads neither of them into the config.
        scaling = reader.get_field(f"{architecture}.rope.scaling.type")
        if "rope_freqs.weight" in self._tensors or (scaling and scaling.contents() != "none"):
            raise ModelError(
                f"{source.gguf}: rope scaling in a GGUF file is not supported; use the Hugging Face folder"
            )

    def get(self, name: str) -> torch.Tensor:
        from gguf.quants import dequantize

        stored = self._gguf_name(name)
        if stored not in self._tensors:
            raise ModelError(f"{self._source.gguf} has no tensor {stored} (for {name})")
        tensor = self._tensors[stored]
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if self._interleaved and (match := re.search(r"attn_(q|k)\.", stored)):
            value = self._rotate_half_order(value, self._spec.num_heads if match[1] == "q" else self._spec.num_kv_heads)
        return value

    @staticmethod
    def _gguf_name(name: str) -> str:
        if name in _GGUF_NAMES:
            return _GGUF_NAMES[name]
        layer, tensor, kind = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
        return f"blk.{layer}.{_GGUF_NAMES[tensor]}.{kind}"

    @staticmethod
    def _rotate_half_order(value: torch.Tensor, heads: int) -> torch.Tensor:
        """Rows of a head from pair order (x0, y0, x1, y1 …) to half order (x0, x1 …, y0, y1 …)."""
        pairs = value.shape[0] // heads // 2
        return value.view(heads, pairs, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
