"""Calibration: rows of tokens walk through a model one layer at a time, and what its linears are fed is noted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from batchinfer.engine.kernels import AttentionBatch, select
from batchinfer.engine.model.decoder import Layer
from batchinfer.engine.model.spec import DecoderSpec

# The matrices of a layer. Embedding and head stay as they are: they are a small part of a model, and errors in them
# reach the tokens undamped.
LINEARS = ("qkv", "o", "gate_up", "down")
CHUNK_TOKENS = 2048  # that are computed at a time


class Inputs:
    """What one linear is fed, ``dtype[tokens, K]``, and what schemes want to know of it."""

    def __init__(self, chunks: list[Tensor]) -> None:
        self.chunks = chunks

    @functools.cached_property
    def hessian(self) -> Tensor:
        """``x.T @ x / tokens``, float32 ``[K, K]``."""
        inputs = self.chunks[0].shape[1]
        total = torch.zeros(inputs, inputs, device=self.chunks[0].device)
        for chunk in self.chunks:
            x = chunk.float()
            total.addmm_(x.T, x)  # in place: of a large model it is as large as a layer
        return total.div_(sum(map(len, self.chunks)))

    @property
    def mean(self) -> Tensor:
        """Mean magnitude of each channel, float32 ``[K]``."""
        return sum(chunk.float().abs().sum(0) for chunk in self.chunks) / sum(map(len, self.chunks))

    @property
    def most(self) -> Tensor:
        """Largest magnitude of each channel, float32 ``[K]``."""
        return torch.stack([chunk.abs().amax(0) for chunk in self.chunks]).amax(0).float()

    def sample(self, rows: int) -> Tensor:
        """``rows`` tokens, float32, drawn at random: what has a place in its row, as first tokens do, stays as rare."""
        x = torch.cat(self.chunks)
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows]
        return x[drawn.to(x.device)].float()


class Walk:
    """The residual streams of some rows on their way through a model; two walks can go side by side."""

    def __init__(
        self,
        spec: DecoderSpec,
        embedding: Tensor,
        rows: Sequence[Sequence[int]],
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            rows: token ids, each row a sequence of its own.
            kv_dtype: what keys and values are kept in, ``dtype`` unless given.
            embedding: ``dtype[vocab, hidden]``; ``dtype`` is what the layers compute in.
        """
        self.spec, dtype = spec, embedding.dtype
        self._kernels = select(device, dtype)
        made = self._kernels.attention
        self._attention = made(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, made.page_size, spec.window, dtype, device, kv_dtype
        )
        self._cos_sin = spec.rope.cos_sin(spec.head_dim, max(map(len, rows))).to(device)
        self._chunks = [self._batch(chunk, device) for chunk in _chunks(rows)]
        tokens = [torch.tensor([token for row in chunk for token in row]) for chunk in _chunks(rows)]
        self._residuals = [embedding[ids].to(device).float() for ids in tokens]
        pages = max(int(batch.page_table.max()) + 1 for batch in self._chunks)
        [self._cache] = self._attention.allocate(1, pages)

    def note(self, layer: Layer) -> dict[str, Inputs]:
        """What each linear of ``layer`` would be fed; nothing moves."""
        noted: dict[str, list[Tensor]] = {linear: [] for linear in LINEARS}
        for residual, batch in zip(self._residuals, self._chunks, strict=True):
            for name, x in self._through(layer, residual.clone(), batch):
                noted[name].append(x)
        return {name: Inputs(chunks) for name, chunks in noted.items()}

    def advance(self, layer: Layer) -> None:
        """Move through ``layer``."""
        for residual, batch in zip(self._residuals, self._chunks, strict=True):
            for _ in self._through(layer, residual, batch):
                pass

    def branch(self) -> Walk:
        """Another from here on. What they share, each writes anew before it reads."""
        other = copy.copy(self)
        other._residuals = [residual.clone() for residual in self._residuals]
        return other

    def normed(self, norm: Tensor) -> Iterator[Tensor]:
        """What the head is fed, chunk by chunk."""
        for residual in self._residuals:
            yield self._norm(residual, None, norm)

    def _through(self, layer: Layer, residual: Tensor, batch: AttentionBatch) -> Iterator[tuple[str, Tensor]]:
        """Compute a layer on ``residual``, in place; yields each linear's name and input before it is used."""
        spec, dtype = self.spec, self._attention.dtype
        normed = self._norm(residual, None, layer.attn_norm)
        yield "qkv", normed
        q = torch.empty(len(residual), spec.num_heads * spec.head_dim, dtype=dtype, device=residual.device)
        self._attention.rope_write(
            layer.qkv(normed), self._cos_sin, batch, self._cache, layer.q_norm, layer.k_norm, spec.rms_norm_eps, q
        )
        attended = self._attention.attend(q, batch, self._cache, torch.empty_like(q))
        yield "o", attended
        normed = self._norm(residual, layer.o(attended), layer.mlp_norm)
        yield "gate_up", normed
        wide = layer.gate_up(normed)
        activated = self._kernels.silu_mul(wide, wide.new_empty(len(wide), spec.intermediate_size))
        yield "down", activated
        residual += layer.down(activated)

    def _norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        out = torch.empty(residual.shape, dtype=self._attention.dtype, device=residual.device)
        return self._kernels.add_rms_norm(residual, delta, weight, self.spec.rms_norm_eps, out)

    def _batch(self, rows: Sequence[Sequence[int]], device: torch.device) -> AttentionBatch:
        """Each row in pages of its own, one after the other."""
        size, lengths = self._attention.page_size, [len(row) for row in rows]
        counts = [-(-length // size) for length in lengths]
        table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
        slots, first = [], 0
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            table[row, :count] = torch.arange(first, first + count)
            slots.append(torch.arange(first * size, first * size + length))
            first += count

        def integers(values: Tensor) -> Tensor:
            return values.to(device, torch.int32)

        return AttentionBatch(
            positions=integers(torch.cat([torch.arange(length) for length in lengths])),
            slots=integers(torch.cat(slots)),
            query_starts=integers(torch.tensor([0, *lengths]).cumsum(0)),
            context_lens=integers(torch.tensor(lengths)),
            page_table=integers(table),
            max_query_len=max(lengths),
            max_context_len=max(lengths),
        )


def _chunks(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Neighbours of about CHUNK_TOKENS together."""
    held: list[Sequence[int]] = []
    for row in rows:
        held.append(row)
        if sum(map(len, held)) >= CHUNK_TOKENS:
            yield held
            held = []
    if held:
        yield held
