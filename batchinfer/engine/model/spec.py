"""DecoderSpec: what a decoder-only transformer is made of, read from a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from batchinfer.errors import ModelError


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (arXiv:2104.09864), rotate-half convention, with optional frequency scaling."""

    theta: float = 10000.0
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """Angular frequency of each pair of dimensions, float32 [head_dim / 2]."""
        inverse = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        return inverse

    def _llama3(self, inverse: torch.Tensor) -> torch.Tensor:
        """Llama 3.1's scaling: long waves are slowed by ``factor``, short ones kept, those between blended."""
        wavelength = 2 * math.pi / inverse
        low, high = self.low_freq_factor, self.high_freq_factor
        blend = ((self.original_max_position / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * inverse / self.factor + blend * inverse

    def cos_sin(self, head_dim: int, max_position: int) -> torch.Tensor:
        """float32 [max_position, head_dim]: cosines of all pairs, then their sines."""
        angles = torch.outer(torch.arange(max_position).float(), self.frequencies(head_dim))
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


@dataclass(frozen=True)
class DecoderSpec:
    """Pre-norm decoder with RMSNorm, RoPE, grouped-query attention and SwiGLU: Llama and its relatives."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    tied_head: bool
    rope: RopeSpec = RopeSpec()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, as in Qwen3
    window: int | None = None  # sliding-window attention: a query sees this many keys, itself included

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DecoderSpec:
        """Read a Hugging Face config.

        Raises:
            ModelError: the family is not known, or the config asks for something the decoder does not compute.
        """
        family = config.get("model_type", "")
        if family not in FAMILIES:
            raise ModelError(f"model_type {family!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ModelError(f"{family} with hidden_act {activation!r} is not supported; expected 'silu'")
        heads = config["num_attention_heads"]
        base = cls(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            max_position=config.get("max_position_embeddings", 2048),
            tied_head=config.get("tie_word_embeddings", False),
            rope=_rope(config),
        )
        if base.num_heads % base.num_kv_heads or base.head_dim % 2:
            raise ModelError(
                f"{base.num_heads} attention heads of {base.head_dim} over {base.num_kv_heads} KV heads: unsupported; "
                "expected a whole number of heads for each KV head, and an even head_dim"
            )
        return FAMILIES[family](base, config)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DecoderSpec:
        return cls(**value | {"rope": RopeSpec(**value["rope"])})

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def _rope(config: dict[str, Any]) -> RopeSpec:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ModelError("rotary embeddings that differ between layers are not supported; expected one for all")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("partial rotary embedding is not supported; expected partial_rotary_factor = 1")
    return RopeSpec(
        theta=float(theta),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_position=int(scaling.get("original_max_position_embeddings", 8192)),
    )


# Defaults below are those of transformers' config classes: a config.json leaves out what is as they say.


def _llama(base: DecoderSpec, config: dict[str, Any]) -> DecoderSpec:
    bias = config.get("attention_bias", False)
    return replace(base, qkv_bias=bias, o_bias=bias, mlp_bias=config.get("mlp_bias", False))


def _mistral(base: DecoderSpec, config: dict[str, Any]) -> DecoderSpec:
    return replace(base, window=config.get("sliding_window", 4096))


def _qwen2(base: DecoderSpec, config: dict[str, Any]) -> DecoderSpec:
    return replace(base, qkv_bias=True, window=_qwen_window(base, config))


def _qwen3(base: DecoderSpec, config: dict[str, Any]) -> DecoderSpec:
    bias, head_dim = config.get("attention_bias", False), config.get("head_dim") or 128
    window = _qwen_window(base, config)
    return replace(base, head_dim=head_dim, qkv_bias=bias, o_bias=bias, qk_norm=True, window=window)


def _qwen_window(base: DecoderSpec, config: dict[str, Any]) -> int | None:
    """Qwen slides the window only where told to: by ``layer_types``, else on layers from ``max_window_layers`` on."""
    if not config.get("use_sliding_window"):
        return None
    slides = range(config.get("max_window_layers", 28), base.num_layers)
    by_number = ("sliding_attention" if layer in slides else "full_attention" for layer in range(base.num_layers))
    kinds = set(config.get("layer_types") or by_number)
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ModelError("a sliding window on some layers only is not supported; set use_sliding_window to false")
    return config.get("sliding_window")


FAMILIES: dict[str, Callable[[DecoderSpec, dict[str, Any]], DecoderSpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
