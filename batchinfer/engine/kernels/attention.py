"""Causal attention over a paged KV cache: the contract and its torch reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Which query rows belong to which sequence, and where that sequence's keys lie. All tensors are int32.

    Sequence ``s`` owns query rows ``query_starts[s]:query_starts[s + 1]``; they are the last of its
    ``context_lens[s]`` keys. Rows of one call may mix prefill chunks and decode steps.
    """

    positions: Tensor  # [tokens] position of each row in its sequence
    slots: Tensor  # [tokens] where its key and value go: page * page_size + offset
    query_starts: Tensor  # [sequences + 1]
    context_lens: Tensor  # [sequences] visible keys, those of this call included
    page_table: Tensor  # [sequences, max_pages]; the row stride may exceed max_pages, the last stride is 1
    max_query_len: int
    max_context_len: int


class PagedAttention(ABC):
    """Attention of one model shape: makes its own cache and is the only one who knows the cache's layout.

    Call ``rope_write`` and then ``attend`` for each layer. Slots that no token was written to may hold anything,
    NaN included; they never reach the output. With a ``window``, key ``j`` is visible to position ``p`` if
    ``p - window < j <= p``, and page-table entries of pages wholly outside every window are not read.
    """

    page_size: ClassVar[int]  # the preferred number of tokens a page

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 or None, got {window}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.page_size = page_size  # type: ignore[misc]  # this instance's, the class holds the preference
        self.window = window
        self.dtype = dtype
        self.device = device
        self.scale = head_dim**-0.5

    @abstractmethod
    def allocate(self, num_layers: int, num_pages: int) -> list[Any]:
        """One opaque cache a layer. Memory is reserved, not touched."""

    @abstractmethod
    def page_bytes(self, num_layers: int) -> int:
        """Bytes that one page costs over all layers."""

    @abstractmethod
    def rope_write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        batch: AttentionBatch,
        cache: Any,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        q_out: Tensor,
    ) -> Tensor:
        """Normalise (if asked) and rotate queries and keys, write keys and values into the cache.

        Args:
            qkv: ``[tokens, (heads + 2 * kv_heads) * head_dim]``: queries, keys, values.
            cos_sin: float32 ``[max_position, head_dim]``: ``head_dim / 2`` cosines, then the sines; rotate-half.
            q_norm, k_norm: float32 ``[head_dim]`` RMSNorm weights over each head (Qwen3), or None.
            q_out: ``[tokens, heads * head_dim]``, receives the queries.
        """

    @abstractmethod
    def attend(self, q: Tensor, batch: AttentionBatch, cache: Any, out: Tensor) -> Tensor:
        """Softmax attention of ``q [tokens, heads * head_dim]`` into ``out`` of the same shape."""


class TorchPagedAttention(PagedAttention):
    """The reference: any device, one sequence after another. A cache is ``[2, pages, page_size, kv_heads, head_dim]``."""

    page_size = 16

    def allocate(self, num_layers: int, num_pages: int) -> list[Tensor]:
        shape = (2, num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        return [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(num_layers)]

    def page_bytes(self, num_layers: int) -> int:
        return num_layers * 2 * self.page_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def rope_write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        batch: AttentionBatch,
        cache: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        q_out: Tensor,
    ) -> Tensor:
        heads = qkv.view(qkv.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)
        keys, values = cache.flatten(1, 2)
        slots = batch.slots.long()
        keys[slots] = _rotate(_head_norm(k.float(), k_norm, eps), cos, sin).to(self.dtype)
        values[slots] = v
        q_out.view_as(q).copy_(_rotate(_head_norm(q.float(), q_norm, eps), cos, sin))
        return q_out

    def attend(self, q: Tensor, batch: AttentionBatch, cache: Tensor, out: Tensor) -> Tensor:
        starts = batch.query_starts.tolist()
        for s, context in enumerate(batch.context_lens.tolist()):
            rows = slice(starts[s], starts[s + 1])
            positions = torch.arange(context - (rows.stop - rows.start), context, device=q.device)
            first = 0 if self.window is None else max(0, context - positions.numel() - self.window + 1)
            first_page = first // self.page_size
            pages = batch.page_table[s, first_page : -(-context // self.page_size)]
            first = first_page * self.page_size
            # [kv_heads, keys, head_dim], only the keys that exist: an unwritten slot may hold NaN
            k, v = cache[:, pages].flatten(1, 2)[:, : context - first].float().transpose(1, 2)
            query = q[rows].float().view(len(positions), self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3)
            scores = query @ k.unsqueeze(1).mT * self.scale  # [kv_heads, group, queries, keys]
            key = torch.arange(first, context, device=q.device)
            hidden = key > positions[:, None]
            if self.window is not None:
                hidden |= key <= positions[:, None] - self.window
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
            out[rows] = (weights @ v.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1).to(out.dtype)
        return out


def _head_norm(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return heads
    return heads * heads.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_() * weight


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
