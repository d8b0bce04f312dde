"""Shard: what of a model one rank holds: a range of layers, and of each of them a tensor-parallel share.

Queries, keys, values, gate and up are split by output (rows of the matrix), the products that follow them by input
(columns), so that a layer needs two sums over its ranks (Megatron-LM, arXiv:1909.08053). Embedding and head are split
by vocabulary. Weights are cut when they are read: one plan serves every layout.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.errors import ModelError

GRAIN = 128  # MLP columns and vocabulary rows are dealt in blocks of this many, where a model has enough of them


@dataclass(frozen=True)
class Shard:
    """One rank's part of ``model``: its layers, and share ``tp_rank`` of ``tp`` of each."""

    model: DecoderSpec
    layers: range
    tp: int = 1
    tp_rank: int = 0
    head_floats: bool = False  # the first layers' rank has the final norm and the head too

    def __post_init__(self) -> None:
        if self.tp > self.model.num_heads:
            raise ModelError(
                f"engine.tp = {self.tp}, but the model has {self.model.num_heads} attention heads and each rank needs "
                "one: lower it, and raise engine.pp instead"
            )

    @property
    def first(self) -> bool:
        """Whether the embedding is here."""
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        """Whether the last layer is here."""
        return self.layers.stop == self.model.num_layers

    @property
    def has_head(self) -> bool:
        """Whether the final norm and the head are here."""
        return self.last or (self.first and self.head_floats)

    @functools.cached_property
    def kv_heads(self) -> range:
        """Its KV heads. With fewer of them than ranks, several ranks hold the same one."""
        count = self.model.num_kv_heads
        if self.tp <= count:
            return _share(count, self.tp, self.tp_rank)
        return range(self._owner(self.tp_rank), self._owner(self.tp_rank) + 1)

    @functools.cached_property
    def heads(self) -> range:
        """The query heads that read its KV heads; of a replicated KV head, its share of them."""
        group = self.model.num_heads // self.model.num_kv_heads
        first, last = self.kv_heads.start * group, self.kv_heads.stop * group
        if self.tp <= self.model.num_kv_heads:
            return range(first, last)
        holders = [rank for rank in range(self.tp) if self._owner(rank) == self.kv_heads.start]
        share = _share(group, len(holders), holders.index(self.tp_rank))
        return range(first + share.start, first + share.stop)

    def _owner(self, rank: int) -> int:
        return rank * self.model.num_kv_heads // self.tp

    @functools.cached_property
    def inner(self) -> range:
        return _share(self.model.intermediate_size, self.tp, self.tp_rank, GRAIN)

    @functools.cached_property
    def vocabulary(self) -> range:
        return _share(self.model.vocab_size, self.tp, self.tp_rank, GRAIN)

    @property
    def vocabulary_shares(self) -> list[int]:
        """How many tokens of the vocabulary each rank of the stage has."""
        return [len(_share(self.model.vocab_size, self.tp, rank, GRAIN)) for rank in range(self.tp)]

    @functools.cached_property
    def spec(self) -> DecoderSpec:
        """The shapes that this rank computes with. The vocabulary stays the model's."""
        return replace(
            self.model,
            num_layers=len(self.layers),
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.inner),
        )

    def cut(self, name: str, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a plan's group of tensors (``embed``, ``layer-000`` …, ``head``)."""
        if self.tp == 1:
            return group
        if name in ("embed", "head"):
            return {key: _rows(t, [self.vocabulary]) if key == "weight" else t for key, t in group.items()}
        cut = {}
        for key, tensor in group.items():
            linear, _, kind = key.partition(".")
            if kind == "bias" and linear in self._inputs and self.tp_rank > 0:
                continue  # the sum over the ranks must hold it once
            cut[key] = self._cut_layer(linear, kind, tensor, group)
        return cut

    def _cut_layer(self, linear: str, kind: str, tensor: Tensor, group: dict[str, Tensor]) -> Tensor:
        if linear in self._outputs and kind not in ("group", "order"):
            return _rows(tensor, self._outputs[linear])
        if linear in self._inputs and kind != "bias":
            if f"{linear}.order" in group:
                raise ModelError(
                    f"{linear} keeps its columns in an order of its own (GPTQ with act-order), which does not let "
                    f"{self.tp} ranks share them: set engine.tp = 1 and raise engine.pp"
                )
            columns, width = self._inputs[linear]
            if f"{linear}.group" in group:
                return _grouped_columns(kind, tensor, columns, width, int(group[f"{linear}.group"]))
            return tensor if tensor.ndim == 1 else _columns(tensor, columns, width)
        return tensor

    @functools.cached_property
    def _outputs(self) -> dict[str, list[range]]:
        heads, kv_heads, inner = self.model.num_heads, self.model.num_kv_heads, self.model.intermediate_size
        keys = _scaled(self.kv_heads, self.model.head_dim, heads)
        values = _scaled(self.kv_heads, self.model.head_dim, heads + kv_heads)
        return {
            "qkv": [_scaled(self.heads, self.model.head_dim), keys, values],
            "gate_up": [self.inner, range(inner + self.inner.start, inner + self.inner.stop)],
        }

    @functools.cached_property
    def _inputs(self) -> dict[str, tuple[range, int]]:
        """The columns of this rank, and how many there are."""
        model = self.model
        attended = _scaled(self.heads, model.head_dim), model.num_heads * model.head_dim
        return {"o": attended, "down": (self.inner, model.intermediate_size)}


def _share(count: int, parts: int, part: int, grain: int = 1) -> range:
    """Part ``part`` of ``count`` things dealt out as evenly as whole blocks of ``grain`` allow."""
    while grain > 1 and count < 4 * grain * parts:
        grain //= 2
    blocks = -(-count // grain)
    first, last = (min(count, blocks * i // parts * grain) for i in (part, part + 1))
    return range(first, last)


def _scaled(heads: range, width: int, offset: int = 0) -> range:
    return range((offset + heads.start) * width, (offset + heads.stop) * width)


def _rows(tensor: Tensor, parts: list[range]) -> Tensor:
    return torch.cat([tensor[part.start : part.stop] for part in parts])


def _columns(tensor: Tensor, part: range, width: int) -> Tensor:
    """Columns of a matrix that is ``width`` wide, of which ``tensor`` may hold several in one element."""
    packed = width // tensor.shape[1]
    return tensor[:, part.start // packed : -(-part.stop // packed)].contiguous()


def _grouped_columns(kind: str, tensor: Tensor, part: range, width: int, group: int) -> Tensor:
    """The same where ``group`` columns share a scale. Groups that the cut goes through become several smaller ones."""
    finer = math.gcd(group, part.start, *([part.stop] if part.stop < width else []))
    if kind == "group":
        return torch.full_like(tensor, finer)
    if kind in ("scale", "zero"):
        tensor = tensor.repeat_interleave(group // finer, dim=1)
        return tensor[:, part.start // finer : -(-part.stop // finer)].contiguous()
    return _columns(tensor, part, width)
