"""Paged attention in Triton: prefill over tiles of queries, decode over splits of a sequence's keys.

All query heads of a KV head share a tile (GQA packing), so that each key and value is read once. A cache is
``[2, pages, kv_heads, page_size * head_dim]``, keys first; a head of a page is one contiguous run of memory. Keys lie
token by token. Values too, unless they are FP8: a tensor core wants neighbours along the tokens, and no instruction
transposes bytes on their way to it. So FP8 values lie in chunks of 16 tokens, ``[chunk, head_dim, 16]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.engine.kernels.attention import AttentionBatch, PagedAttention

CHUNK = 16  # tokens of transposed FP8 values
_LOG2E = 1.4426950408889634


@triton.jit
def _visit(
    q, top, total, acc, table, k_cache, v_cache, head, tile, context, position, scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHUNK_: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the running softmax of ``q [rows, dim]`` (arXiv:2205.14135).

    Where not MASKED every key is visible to every row.
    """
    tl.static_assert(PAGE % BLOCK_N == 0, "a tile lies within a page")
    dim = tl.arange(0, BLOCK_D)
    key = tl.arange(0, BLOCK_N)
    page = tl.load(table + tile * BLOCK_N // PAGE).to(tl.int64)
    within = tile * BLOCK_N % PAGE
    start = (page * KV_HEADS + head) * (PAGE * DIM) + within * DIM
    position -= tile * BLOCK_N
    k_at = k_cache + start + key[None, :] * DIM + dim[:, None]  # transposed: [dim, keys]
    if DIM == BLOCK_D:
        k = tl.load(k_at)
    else:
        k = tl.load(k_at, mask=dim[:, None] < DIM, other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen no key yet
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    if TRANSPOSED:
        at = key[None, :] // CHUNK_ * (DIM * CHUNK_) + dim[:, None] * CHUNK_ + key[None, :] % CHUNK_
        at = tl.max_contiguous(tl.multiple_of(at, (1, CHUNK_)), (1, CHUNK_))  # the compiler does not see it by itself
        if DIM == BLOCK_D:
            v = tl.load(v_cache + start + at)
        else:
            v = tl.load(v_cache + start + at, mask=dim[:, None] < DIM, other=0.0)
        v = tl.trans(v.to(q.dtype))
    else:
        v_at = v_cache + start + key[:, None] * DIM + dim[None, :]
        if DIM == BLOCK_D:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=dim[None, :] < DIM, other=0.0)
        v = v.to(q.dtype)
    if MASKED:  # an unwritten slot may hold NaN, and NaN * 0 is NaN
        v = tl.where((tile * BLOCK_N + key < context)[:, None], v, 0.0)
    acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def _decode(
    q, k_cache, v_cache, table, context_lens, counts, out, partial, partial_lse, scales, scale, table_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHUNK_: tl.constexpr, SPLITS: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One query token of one sequence: program (sequence, KV head, split of its keys)."""
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if sequence >= tl.load(counts):  # no decode
        return
    context = tl.load(context_lens + sequence)
    member = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    mine = (member[:, None] < GROUP) & (dim[None, :] < DIM)
    at = ((sequence * KV_HEADS + head) * GROUP + member[:, None]) * DIM + dim[None, :]
    query = tl.load(q + at, mask=mine, other=0.0).to(COMPUTE)
    table += sequence * table_stride
    k_scale, v_scale = tl.load(scales + head), tl.load(scales + KV_HEADS + head)
    scale *= k_scale

    begin = 0
    if WINDOW:
        begin = tl.maximum(context - WINDOW, 0) // BLOCK_N
    end = tl.cdiv(context, BLOCK_N)  # in tiles of keys
    share = tl.cdiv(end - begin, SPLITS)
    begin += split * share
    end = tl.minimum(begin + share, end)
    position = tl.zeros([BLOCK_M], tl.int32) + (context - 1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = begin
    if not WINDOW:
        whole = tl.maximum(begin, tl.minimum(end, context // BLOCK_N))
        for keys in tl.range(begin, whole, num_stages=STAGES):
            top, total, acc = _visit(
                query, top, total, acc, table, k_cache, v_cache, head, keys, context, position, scale,
                KV_HEADS, DIM, PAGE, WINDOW, TRANSPOSED, CHUNK_, False, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    for keys in tl.range(whole, end, num_stages=1):
        top, total, acc = _visit(
            query, top, total, acc, table, k_cache, v_cache, head, keys, context, position, scale,
            KV_HEADS, DIM, PAGE, WINDOW, TRANSPOSED, CHUNK_, True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    some = tl.where(total > 0, total, 1.0)
    acc = acc * (v_scale / some)[:, None]
    if SPLITS == 1:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mine)
    else:
        row = (sequence * KV_HEADS + head) * GROUP + member
        place = row * SPLITS + split
        tl.store(partial + place[:, None] * DIM + dim[None, :], acc, mask=mine)
        tl.store(partial_lse + place, tl.where(total > 0, top + tl.log2(some), float("-inf")), mask=member < GROUP)


@triton.jit
def _merge(
    partial, partial_lse, counts, out,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The splits of one query head, weighed by their softmax totals."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if sequence >= tl.load(counts):
        return
    split, dim = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    place = (sequence * HEADS + head) * SPLITS + split
    lse = tl.load(partial_lse + place, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    mask = (split[:, None] < SPLITS) & (weight[:, None] > 0) & (dim[None, :] < DIM)
    values = tl.load(partial + place[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    merged = tl.sum(values * weight[:, None], 0)
    tl.store(out + (sequence * HEADS + head) * DIM + dim, merged.to(out.dtype.element_ty), mask=dim < DIM)


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q, k_cache, v_cache, table, query_starts, context_lens, counts, out, scales, scale, table_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHUNK_: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of neighbouring queries of one sequence, all heads of one KV head: program (tile, KV head).

    Each sequence has room for one tile more than its queries may need, so that its first tile is found without a list.
    """
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile, head = tl.program_id(0), tl.program_id(1)
    first, sequences = tl.load(counts), tl.load(counts + 1)
    origin = tl.load(query_starts + first)
    if tile >= (tl.load(query_starts + sequences) - origin) // QUERIES + sequences - first:
        return
    low, high = first, sequences  # the last sequence whose first tile is not after this one
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(query_starts + middle) - origin) // QUERIES + middle - first <= tile:
            low = middle
        else:
            high = middle
    sequence = low
    start, stop = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    query = (tile - ((start - origin) // QUERIES + sequence - first)) * QUERIES
    if query >= stop - start:
        return
    context = tl.load(context_lens + sequence)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = query + row // GROUP
    position = context - (stop - start) + token
    mine = ((token < stop - start) & (row < QUERIES * GROUP))[:, None] & (dim[None, :] < DIM)
    at = (((start + token).to(tl.int64) * KV_HEADS + head) * GROUP + row % GROUP)[:, None] * DIM + dim[None, :]
    queries = tl.load(q + at, mask=mine, other=0.0).to(COMPUTE)
    table += sequence.to(tl.int64) * table_stride
    k_scale, v_scale = tl.load(scales + head), tl.load(scales + KV_HEADS + head)
    scale *= k_scale

    earliest = context - (stop - start) + query  # position of the tile's first query
    latest = tl.minimum(earliest + QUERIES, context)  # keys that the tile's last query sees
    begin = 0
    if WINDOW:
        begin = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = begin
    if not WINDOW:
        whole = (earliest + 1) // BLOCK_N
        for keys in tl.range(begin, whole, num_stages=STAGES):
            top, total, acc = _visit(
                queries, top, total, acc, table, k_cache, v_cache, head, keys, context, position, scale,
                KV_HEADS, DIM, PAGE, WINDOW, TRANSPOSED, CHUNK_, False, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    for keys in tl.range(whole, tl.cdiv(latest, BLOCK_N), num_stages=1):
        top, total, acc = _visit(
            queries, top, total, acc, table, k_cache, v_cache, head, keys, context, position, scale,
            KV_HEADS, DIM, PAGE, WINDOW, TRANSPOSED, CHUNK_, True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    acc = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mine)


@triton.jit
def _turn(first, second, norm, cos, sin, eps, low, half: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr):
    """RMSNorm over each head where asked, then the rotation; ``first`` and ``second`` are the halves of the heads."""
    if NORM:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half)
        inverse = tl.rsqrt(mean + eps)[:, None]
        weight = tl.load(norm + low, mask=low < half, other=0.0)[None, :]
        first = first * inverse * weight
        weight = tl.load(norm + half + low, mask=low < half, other=0.0)[None, :]
        second = second * inverse * weight
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_write(
    qkv, cos_sin, positions, slots, k_cache, v_cache, q_norm, k_norm, scales, eps, q_out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHUNK_: tl.constexpr, NORM: tl.constexpr, FP8: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One token, all its heads."""
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    low = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    cos = tl.load(cos_sin + position * DIM + low, mask=low < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin + position * DIM + HALF + low, mask=low < HALF, other=0.0)[None, :]
    qkv += token * (HEADS + 2 * KV_HEADS) * DIM

    heads = tl.arange(0, BLOCK_H)
    mask = (heads[:, None] < HEADS) & (low[None, :] < HALF)
    at = heads[:, None] * DIM + low[None, :]
    first = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv + HALF + at, mask=mask, other=0.0).to(tl.float32)
    first, second = _turn(first, second, q_norm, cos, sin, eps, low, HALF, NORM, BLOCK_H)
    q_out += token * HEADS * DIM
    tl.store(q_out + at, first.to(q_out.dtype.element_ty), mask=mask)
    tl.store(q_out + HALF + at, second.to(q_out.dtype.element_ty), mask=mask)
    if slot < 0:  # padding
        return

    heads = tl.arange(0, BLOCK_KV)
    mask = (heads[:, None] < KV_HEADS) & (low[None, :] < HALF)
    at = heads[:, None] * DIM + low[None, :]
    qkv += HEADS * DIM
    first = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv + HALF + at, mask=mask, other=0.0).to(tl.float32)
    first, second = _turn(first, second, k_norm, cos, sin, eps, low, HALF, NORM, BLOCK_KV)
    qkv += KV_HEADS * DIM
    v_first = tl.load(qkv + at, mask=mask, other=0.0)
    v_second = tl.load(qkv + HALF + at, mask=mask, other=0.0)
    if FP8:
        k_scale = tl.load(scales + heads, mask=heads < KV_HEADS, other=1.0)[:, None]
        v_scale = tl.load(scales + KV_HEADS + heads, mask=heads < KV_HEADS, other=1.0)[:, None]
        first, second = _saturate(first / k_scale), _saturate(second / k_scale)
        v_first, v_second = _saturate(v_first / v_scale), _saturate(v_second / v_scale)
    page, within = (slot // PAGE).to(tl.int64), slot % PAGE
    start = (page * KV_HEADS + heads[:, None]) * (PAGE * DIM)
    at = start + within * DIM + low[None, :]
    tl.store(k_cache + at, first.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(k_cache + HALF + at, second.to(k_cache.dtype.element_ty), mask=mask)
    if TRANSPOSED:
        at = start + within // CHUNK_ * (DIM * CHUNK_) + low[None, :] * CHUNK_ + within % CHUNK_
        tl.store(v_cache + at, v_first.to(v_cache.dtype.element_ty), mask=mask)
        tl.store(v_cache + HALF * CHUNK_ + at, v_second.to(v_cache.dtype.element_ty), mask=mask)
    else:
        tl.store(v_cache + at, v_first.to(v_cache.dtype.element_ty), mask=mask)
        tl.store(v_cache + HALF + at, v_second.to(v_cache.dtype.element_ty), mask=mask)


@triton.jit
def _saturate(x):
    return tl.clamp(x.to(tl.float32), -448.0, 448.0)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is cut: chosen by measuring, see tests/bench/GPU_NOTES.md."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class GpuPagedAttention(PagedAttention):
    """Works for any head size up to 256, in float32 and bfloat16, with keys and values as they are or in FP8 e4m3.

    FP8 keys and values are scaled by ``scales [2, kv_heads]`` (float32), 1 unless they were calibrated. They are
    multiplied in float16, which holds them exactly.
    """

    page_size = 64  # a tile of keys lies within a page, so that a page number serves a whole tile

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
        super().__init__(num_heads, num_kv_heads, head_dim, page_size, window, dtype, device)
        if page_size % CHUNK or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two from {CHUNK} on, got {page_size}")
        if head_dim > 256:
            raise ValueError(f"head_dim must be at most 256, got {head_dim}")
        self.kv_dtype = kv_dtype or dtype
        self.fp8 = self.kv_dtype == torch.float8_e4m3fn
        self.transposed = self.fp8
        self.group = num_heads // num_kv_heads
        self.block_d = max(16, triton.next_power_of_2(head_dim))
        self.scales = torch.ones(2, num_kv_heads, dtype=torch.float32, device=device)
        self.decode_tile, self.prefill_tile = self._tiles()
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        )
        self._partial: dict[int, tuple[Tensor, Tensor]] = {}

    def _tiles(self) -> tuple[Tile, Tile]:
        group = max(16, triton.next_power_of_2(self.group))
        if self.dtype == torch.float32 or self.block_d > 128:
            keys = min(32, self.page_size)
            return Tile(group, keys, 4, 2), Tile(max(32, group), keys, 4, 2)
        keys, wide = min(64, self.page_size), self.block_d > 64
        decode_warps = (4 if self.fp8 else 2) if wide else 1
        return Tile(group, keys, decode_warps, 3), Tile(max(128, group), keys, 8 if wide else 4, 3)

    @cached_property
    def _shape(self) -> dict[str, object]:
        return {
            "KV_HEADS": self.num_kv_heads,
            "DIM": self.head_dim,
            "PAGE": self.page_size,
            "TRANSPOSED": self.transposed,
            "CHUNK_": CHUNK,
        }

    @cached_property
    def _arithmetic(self) -> dict[str, object]:
        compute = tl.float16 if self.fp8 else tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32
        return {
            "GROUP": self.group,
            "WINDOW": self.window or 0,
            "COMPUTE": compute,
            "BLOCK_D": self.block_d,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
        }

    def allocate(self, num_layers: int, num_pages: int) -> list[Tensor]:
        shape = (2, num_pages, self.num_kv_heads, self.page_size * self.head_dim)
        return [torch.empty(shape, dtype=self.kv_dtype, device=self.device) for _ in range(num_layers)]

    def page_bytes(self, num_layers: int) -> int:
        return num_layers * 2 * self.page_size * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize

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
        assert qkv.is_contiguous() and q_out.is_contiguous()
        _rope_write[(len(qkv),)](
            qkv, cos_sin, batch.positions, batch.slots, cache[0], cache[1], q_norm, k_norm, self.scales, eps, q_out,
            HEADS=self.num_heads, NORM=q_norm is not None, FP8=self.fp8,
            BLOCK_H=triton.next_power_of_2(self.num_heads), BLOCK_KV=triton.next_power_of_2(self.num_kv_heads),
            BLOCK_HALF=triton.next_power_of_2(self.head_dim // 2), num_warps=4, **self._shape,
        )  # fmt: skip
        return q_out

    def attend(self, q: Tensor, batch: AttentionBatch, cache: Tensor, out: Tensor) -> Tensor:
        assert q.is_contiguous() and out.is_contiguous()
        if batch.counts is None:  # nobody has told them apart: prefill is right for all of them
            sequences = len(batch.context_lens)
            counts = torch.tensor([0, sequences], dtype=torch.int32, device=q.device)
            batch = replace(batch, decodes=0, prefills=sequences, counts=counts)
        if batch.decodes:
            self._attend_decodes(q, batch, cache, out)
        if batch.prefills:
            self._attend_prefills(q, batch, cache, out)
        return out

    def _attend_decodes(self, q: Tensor, batch: AttentionBatch, cache: Tensor, out: Tensor) -> None:
        tile, sequences = self.decode_tile, batch.decodes
        splits = self.splits(sequences, batch.max_context_len)
        partial, lse = self._partials(sequences, splits) if splits > 1 else (out, out)
        _decode[(sequences, self.num_kv_heads, splits)](
            q, cache[0], cache[1], batch.page_table, batch.context_lens, batch.counts, out, partial, lse, self.scales,
            self.scale * _LOG2E, batch.page_table.stride(0),
            SPLITS=splits, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages,
            num_warps=tile.warps, **self._shape, **self._arithmetic,
        )  # fmt: skip
        if splits > 1:
            _merge[(sequences, self.num_heads)](
                partial, lse, batch.counts, out, HEADS=self.num_heads, DIM=self.head_dim,
                SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=self.block_d, num_warps=1,
            )  # fmt: skip

    def splits(self, sequences: int, max_context_len: int) -> int:
        """Parts that each sequence's keys are cut into, so that few sequences still fill the card."""
        wanted = 6 * self._processors // (sequences * self.num_kv_heads)
        useful = max_context_len // (2 * self.decode_tile.block_n)
        splits = max(1, min(16, wanted, useful))
        return 1 << (splits.bit_length() - 1)  # powers of two: few variants to compile

    def _partials(self, sequences: int, splits: int) -> tuple[Tensor, Tensor]:
        """Memory for the splits' results; a later call may write over it."""
        rows = sequences * splits * self.num_heads
        size = 1 << (rows - 1).bit_length()
        if size not in self._partial:
            self._partial[size] = (
                torch.empty(size, self.head_dim, dtype=torch.float32, device=self.device),
                torch.empty(size, dtype=torch.float32, device=self.device),
            )
        return self._partial[size]

    def _attend_prefills(self, q: Tensor, batch: AttentionBatch, cache: Tensor, out: Tensor) -> None:
        tile = self.prefill_tile
        tiles = len(q) // (tile.block_m // self.group) + batch.prefills
        _prefill[(tiles, self.num_kv_heads)](
            q, cache[0], cache[1], batch.page_table, batch.query_starts, batch.context_lens, batch.counts, out,
            self.scales, self.scale * _LOG2E, batch.page_table.stride(0),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps,
            **self._shape, **self._arithmetic,
        )  # fmt: skip
