"""Decoder: the layers of a model that one rank holds, and their forward pass over the tokens of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from batchinfer.engine.kernels import AttentionBatch, Kernels, PagedAttention
from batchinfer.engine.kernels.linear import Linear, load_linear
from batchinfer.engine.kernels.linear.fp8 import E4M3, Unscaled
from batchinfer.engine.model.shard import Shard

Group = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights, on their device and in their packed layout."""

    attn_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    @classmethod
    def from_weights(cls, group: Group, winners: Mapping[str, str] = MappingProxyType({})) -> Layer:
        """
        Args:
            winners: linear and form → contender, see ``load_linear``.
        """
        return cls(
            attn_norm=group["attn_norm.weight"],
            qkv=load_linear(group, "qkv", winners),
            q_norm=group.get("q_norm.weight"),
            k_norm=group.get("k_norm.weight"),
            o=load_linear(group, "o", winners),
            mlp_norm=group["mlp_norm.weight"],
            gate_up=load_linear(group, "gate_up", winners),
            down=load_linear(group, "down", winners),
        )


class Decoder:
    """A decoder-only transformer, or one rank's shard of it: embedding, layers, final norm and head.

    The residual stream is float32 whatever the weights' dtype; every matrix product takes and gives ``dtype``.
    """

    def __init__(
        self,
        shard: Shard,
        weights: Callable[[str], Group],
        kernels: Kernels,
        attention: PagedAttention,
        *,
        max_tokens: int,
        max_position: int,
        dtype: torch.dtype,
        device: torch.device,
        all_reduce: Callable[[Tensor], Tensor],
        winners: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            weights: reads one group of tensors (``embed``, ``layer-000`` …, ``head``), on any device.
            max_tokens: most tokens of a step; buffers are made for them once.
            max_position: positions that RoPE is tabulated for.
            all_reduce: sums a tensor over the ranks that share these layers.
            winners: linear and form → contender, those that the build found fastest.
        """

        def load(name: str) -> Group:
            # Matrices are mostly repacked. What is small is copied, or it would keep the whole file in memory.
            # Cut where they are to be: a GPU does in passing what takes a host longer than to read them.
            cut = shard.cut(name, {key: value.to(device, copy=value.ndim == 1) for key, value in weights(name).items()})
            if device.type == "cuda" and shard.tp > 1:
                torch.cuda.empty_cache()  # of what they were cut from, before something else takes a corner of it
            return cut

        spec = shard.spec
        self.shard = shard
        self.spec = spec
        self.kernels = kernels
        self.attention = attention
        self.all_reduce = all_reduce
        tied = shard.has_head and spec.tied_head
        self.embedding = load("embed")["weight"] if shard.first or tied else None
        self.layers = [Layer.from_weights(load(f"layer-{layer:03d}"), winners) for layer in shard.layers]
        if shard.has_head:
            head = load("head")
            self.norm = head["norm.weight"]
            weight = self.embedding if tied else head["weight"]
            self.head = load_linear({"head.weight": weight}, "head", winners)
            # Large, and every step of another size: made anew each time it would take up to twice the memory.
            most = max_tokens, len(shard.vocabulary)
            self._logits = torch.empty(most, dtype=dtype, device=device) if self.head.into else None
        if tied and self.head.rows is not None:
            self._rows_of_embedding = self.head.rows
            self.embedding = self.head.weight  # kept once, None where that is in the layout of the product
        elif shard.first:
            self._rows_of_embedding = self.embedding.__getitem__
        fuse = kernels.fuse if shard.tp == 1 else None
        self._fused = fuse and fuse(self.layers[:-1], attention, max_tokens, spec.rms_norm_eps)
        self.cos_sin = spec.rope.cos_sin(spec.head_dim, max_position).to(device)
        heads = spec.num_heads * spec.head_dim
        self.dtype = dtype
        self._max_tokens, self._device = max_tokens, device
        self._rooms: dict[tuple[int, torch.dtype], tuple[Tensor, ...]] = {}
        self._q = torch.empty(max_tokens, heads, dtype=dtype, device=device)
        self._attended = torch.empty(max_tokens, heads, dtype=dtype, device=device)

    def forward(
        self,
        inputs: Tensor,
        batch: AttentionBatch,
        caches: list,
        sampled: Tensor | None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Run the tokens of a step through the layers; keys and values go to ``caches``.

        Args:
            inputs: for the first layers token ids, integer ``[tokens]``; for others the residual stream that the layers
                before gave, float32 ``[tokens, hidden]``, which is overwritten.
            sampled: integer ``[samples]``, places among the tokens; None for all of them.
            logits: ``dtype [at least samples, vocabulary]``; if given, what follows the last layer comes here too.

        Returns:
            The residual stream, float32 ``[tokens, hidden]``, after the last layer ``[samples, hidden]``; or logits.
        """
        residual = self.embed(inputs) if self.shard.first else inputs
        return self.finish(residual, self.attend(residual, batch, caches), sampled, logits)

    def attend(self, residual: Tensor, batch: AttentionBatch, caches: list) -> Tensor:
        """Run the residual stream of a step, which is overwritten, through all that comes before the last layer's o.

        Returns:
            What its attention gives, ``dtype [tokens, heads * head_dim]``, in the same memory every time.
        """
        attended = self._attended[: len(residual)]
        delta, layers = None, list(zip(self.layers, caches, strict=True))
        if self._fused is not None:
            delta, layers = self._fused(residual, self.cos_sin, batch, caches), layers[-1:]
        for layer, cache in layers:
            normed = self._room(*residual.shape, layer.qkv)
            self.kernels.add_rms_norm(residual, delta, layer.attn_norm, self.spec.rms_norm_eps, *normed)
            qkv, q = self._for_kernels(layer.qkv, normed), self._q[: len(residual)]
            norms = layer.q_norm, layer.k_norm, self.spec.rms_norm_eps
            self.attention.rope_write(qkv, self.cos_sin, batch, cache, *norms, q)
            self.attention.attend(q, batch, cache, attended)
            if layer is not self.layers[-1]:
                delta = self._after_attention(layer, residual, attended)
        return attended

    def finish(
        self, residual: Tensor, attended: Tensor, sampled: Tensor | None, logits: Tensor | None = None
    ) -> Tensor:
        """What comes after ``attend``; arguments and result are those of ``forward``."""
        if self.shard.last and sampled is not None:
            # Keys and values are written: from here on only tokens whose logits are wanted matter.
            attended, residual = attended[sampled], residual[sampled]
            if not len(sampled):
                return residual if logits is None else logits[:0]
        delta = self._after_attention(self.layers[-1], residual, attended, handed_on=logits is None)
        return residual.add_(delta) if logits is None else self.logits(residual, delta, logits)

    def _after_attention(
        self, layer: Layer, residual: Tensor, attended: Tensor, handed_on: bool = False
    ) -> Tensor | Unscaled:
        """What a layer's MLP adds to the residual stream, which gets what its attention adds.

        Args:
            handed_on: to others than kernels, who would scale it in passing.
        """
        o = self._for_kernels(layer.o, self._as_taken(attended, layer.o), summed=True)
        normed = self._room(*residual.shape, layer.gate_up)
        self.kernels.add_rms_norm(residual, self.all_reduce(o), layer.mlp_norm, self.spec.rms_norm_eps, *normed)
        activated = self._room(len(residual), self.spec.intermediate_size, layer.down)
        if layer.gate_up.gated is not None:
            layer.gate_up.gated(*normed, *activated)
        else:
            self.kernels.silu_mul(layer.gate_up(*normed), *activated)
        down = layer.down(*activated) if handed_on else self._for_kernels(layer.down, activated, summed=True)
        return self.all_reduce(down)

    def logits(self, residual: Tensor, delta: Tensor | Unscaled | None = None, out: Tensor | None = None) -> Tensor:
        """What follows the last layer: final norm and head.

        Args:
            residual: float32 ``[samples, hidden]``, which is overwritten.
            delta: what is still to be added to it.
            out: ``dtype [at least samples, vocabulary]``, where logits go if given.

        Returns:
            ``dtype [samples, vocabulary]``, this rank's columns of it, until the next call.
        """
        normed = self._room(*residual.shape, self.head)
        self.kernels.add_rms_norm(residual, delta, self.norm, self.spec.rms_norm_eps, *normed)
        if out is not None:
            return torch.mm(*normed, self.head.weight.t(), out=out[: len(residual)])
        if self._logits is not None:
            return self.head.into(*normed, self._logits[: len(residual)])
        return self.head(*normed)

    def _for_kernels(self, linear: Linear, x: tuple[Tensor, ...], summed: bool = False) -> Tensor | Unscaled:
        """A product that kernels read which may also scale it in passing; ``summed`` over ranks it has its scales."""
        if len(x) == 1 or summed and self.shard.tp > 1:
            return linear(*x)
        return linear.unscaled(*x)

    def _room(self, tokens: int, width: int, linear: Linear) -> tuple[Tensor, ...]:
        """Memory for what ``linear`` takes: values, and a scale a token where the kernels quantise them in passing."""
        fused = self.kernels.quantize is not None and linear.input_dtype == E4M3
        dtype = E4M3 if fused else self.dtype
        if (width, dtype) not in self._rooms:
            room = [torch.empty(self._max_tokens, width, dtype=dtype, device=self._device)]
            if fused:
                room.append(torch.empty(self._max_tokens, 1, dtype=torch.float32, device=self._device))
            self._rooms[width, dtype] = tuple(room)
        return tuple(part[:tokens] for part in self._rooms[width, dtype])

    def _as_taken(self, x: Tensor, linear: Linear) -> tuple[Tensor, ...]:
        """``x`` as ``linear`` takes it."""
        room = self._room(*x.shape, linear)
        if len(room) == 1:
            return (x,)
        self.kernels.quantize(x, *room)
        return room

    def embed(self, token_ids: Tensor) -> Tensor:
        """The residual stream that the layers begin with, float32 ``[tokens, hidden]``."""
        if self.shard.tp == 1:
            return self._rows_of_embedding(token_ids).float()
        places = token_ids - self.shard.vocabulary.start
        here = (places >= 0) & (places < len(self.shard.vocabulary))
        rows = self._rows_of_embedding(places.clamp(0, len(self.shard.vocabulary) - 1))
        return self.all_reduce(rows.float() * here[:, None])
