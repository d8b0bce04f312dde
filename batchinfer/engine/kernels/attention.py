"""Causal attention over a paged KV cache: the contract and its torch reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

KV_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}  # by the names that plans have for them
SHARERS = 32  # neighbours in a batch whose pages are compared, see ``shared_pages``
GATHER_BYTES = 64 * 2**20  # of keys and values that the reference holds in float32 at a time


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
    # For kernels that treat sequences of one row apart: how many there are at the front, and how many after them.
    # ``counts`` is what counts on a GPU, [2]: those at the front, and all; the numbers are the most that it may say.
    # Without it nothing is known of them.
    decodes: int = 0
    prefills: int = 0
    counts: Tensor | None = None
    shared: Tensor | None = None  # what ``shared_pages`` found, for kernels that read such pages once for all

    @classmethod
    def decoding(cls, sequences: int, context: int, page_size: int, device: torch.device) -> AttentionBatch:
        """A step of so many sequences with one row each, all of one length, each with pages of its own: to be timed."""
        pages = torch.arange(sequences * -(-context // page_size)).view(sequences, -1)
        last = context - 1

        def integers(values: Tensor) -> Tensor:
            return values.to(device, torch.int32)

        return cls(
            positions=integers(torch.full((sequences,), last)),
            slots=integers(pages[:, last // page_size] * page_size + last % page_size),
            query_starts=integers(torch.arange(sequences + 1)),
            context_lens=integers(torch.full((sequences,), context)),
            page_table=integers(pages),
            max_query_len=1,
            max_context_len=context,
            decodes=sequences,
            counts=integers(torch.tensor([sequences, sequences])),
        )


def shared_pages(page_table: np.ndarray, context_lens: np.ndarray, page_size: int) -> np.ndarray:
    """How many pages the sequences begin with alike, of each SHARERS neighbours: int32 ``[ceil(sequences / SHARERS)]``.

    Only pages that all of them see as a whole count, and 0 is said where they are too few to gain anything.
    """
    groups = -(-len(page_table) // SHARERS)
    found = np.zeros(groups, np.int32)
    first = np.arange(groups) * SHARERS
    leaders = np.repeat(page_table[first, 0], SHARERS)[: len(page_table)]
    alike = np.logical_and.reduceat(page_table[:, 0] == leaders, first)
    alike[-1] &= len(page_table) - first[-1] >= SHARERS // 4
    for group in np.flatnonzero(alike):
        rows = slice(first[group], first[group] + SHARERS)
        most = int(context_lens[rows].min()) // page_size
        same = (page_table[rows, :most] == page_table[first[group], :most]).all(axis=0)
        found[group] = most if same.all() else same.argmin()
    return found


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
        kv_dtype: torch.dtype | None = None,
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
        self.kv_dtype = kv_dtype or dtype  # of keys and values; int8: rounded, cut at ±127
        self.device = device
        self.scale = head_dim**-0.5

    @abstractmethod
    def allocate(self, num_layers: int, num_pages: int) -> list[Any]:
        """One opaque cache a layer. Memory is reserved, not touched."""

    @abstractmethod
    def page_bytes(self, num_layers: int) -> int:
        """Bytes that one page costs over all layers."""

    def by_head(self, caches: Sequence[Any]) -> list[Tensor]:
        """Views of neighbouring caches as ``[pages, kv_heads, …]``, for moving keys and values between ranks.

        One for each cache, or one for all where they lie side by side; here for caches ``[2, pages, kv_heads, …]``.
        """
        return [cache.movedim(0, 2) for cache in caches]

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
    """The reference, on any device. A cache is ``[2, pages, page_size, kv_heads, head_dim]``."""

    page_size = 16

    def allocate(self, num_layers: int, num_pages: int) -> list[Tensor]:
        shape = (2, num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        return [torch.empty(shape, dtype=self.kv_dtype, device=self.device) for _ in range(num_layers)]

    def page_bytes(self, num_layers: int) -> int:
        return num_layers * 2 * self.page_size * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize

    def by_head(self, caches: Sequence[Tensor]) -> list[Tensor]:
        return [cache.permute(1, 3, 0, 2, 4) for cache in caches]

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
        keys[slots] = self._kept(_rotate(_head_norm(k.float(), k_norm, eps), cos, sin))
        values[slots] = self._kept(v)
        q_out.view_as(q).copy_(_rotate(_head_norm(q.float(), q_norm, eps), cos, sin))
        return q_out

    def _kept(self, x: Tensor) -> Tensor:
        return (x.float().round().clamp(-127, 127) if self.kv_dtype == torch.int8 else x).to(self.kv_dtype)

    def attend(self, q: Tensor, batch: AttentionBatch, cache: Tensor, out: Tensor) -> Tensor:
        starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
        for group in self._groups(starts, contexts):
            rows = slice(starts[group.start], starts[group.stop])
            self._attend_group(q[rows], batch, group, contexts[group], cache, out[rows])
        return out

    def _groups(self, starts: list[int], contexts: list[int]) -> Iterator[slice]:
        """Neighbours with equally many rows, as many as fit the memory for their keys padded to the longest."""
        most_keys = GATHER_BYTES // (8 * self.num_kv_heads * self.head_dim)
        first, longest = 0, 0
        for s, context in enumerate(contexts):
            longest = max(longest, context)
            same = starts[s + 1] - starts[s] == starts[first + 1] - starts[first]
            if s > first and not (same and (s + 1 - first) * longest <= most_keys):
                yield slice(first, s)
                first, longest = s, context
        if contexts:
            yield slice(first, len(contexts))

    def _attend_group(
        self, q: Tensor, batch: AttentionBatch, group: slice, contexts: list[int], cache: Tensor, out: Tensor
    ) -> None:
        sequences, page_size, window = len(contexts), self.page_size, self.window or max(contexts)
        queries = q.shape[0] // sequences
        if not queries:
            return
        context = batch.context_lens[group, None].long()
        position = context - queries + torch.arange(queries, device=q.device)  # [sequences, queries]
        first_page = max(0, min(contexts) - queries - window + 1) // page_size
        page = torch.arange(first_page, -(-max(contexts) // page_size), device=q.device)
        live = (page * page_size < context) & ((page + 1) * page_size > position[:, :1] - window + 1)
        pages = torch.where(live, batch.page_table[group, first_page : first_page + len(page)], 0).long()

        key = torch.arange(first_page * page_size, (first_page + len(page)) * page_size, device=q.device)
        hidden = (key > position[..., None]) | (key <= position[..., None] - window)  # [sequences, queries, keys]
        k, v = (  # [sequences, kv_heads, keys, head_dim]
            cache[:, pages].flatten(2, 3).transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)
        )
        v.masked_fill_(hidden.all(dim=1)[:, None, :, None], 0)  # an unwritten slot may hold NaN, and NaN * 0 is NaN
        query = q.float().view(sequences, queries, self.num_kv_heads, -1, self.head_dim).permute(0, 2, 3, 1, 4)
        scores = query.flatten(2, 3) @ k.mT * self.scale  # [sequences, kv_heads, group * queries, keys]
        scores.view(*query.shape[:-1], -1).masked_fill_(hidden[:, None, None], float("-inf"))
        values = (scores.softmax(dim=-1) @ v).view(query.shape)
        out.copy_(values.permute(0, 3, 1, 2, 4).reshape(out.shape))


def _head_norm(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return heads
    return heads * heads.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_() * weight


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
