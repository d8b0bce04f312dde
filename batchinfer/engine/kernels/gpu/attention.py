"""Paged attention on NVIDIA GPUs: which kernel is launched for what, and how it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.engine.kernels.attention import SHARERS, AttentionBatch, PagedAttention
from batchinfer.engine.kernels.gpu import flash
from batchinfer.engine.kernels.gpu.elementwise import in_parts
from batchinfer.engine.kernels.gpu.flash_fp8 import decode_fp8
from batchinfer.engine.kernels.gpu.rope import rope_write, write_values
from batchinfer.engine.kernels.linear.fp8 import Unscaled

CHUNK = 32  # tokens of transposed FP8 values: what memory gives at a time is 32 bytes
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is cut: chosen by measuring, see tests/bench/GPU_NOTES.md."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread at most, so that more programs fit a processor


class GpuPagedAttention(PagedAttention):
    """Works for any head size up to 256, in float32 and bfloat16, with keys and values as they are or in FP8 e4m3.

    FP8 keys and values are scaled by ``scales [2, kv_heads]`` (float32), 1 unless they were calibrated, and multiplied
    as they are: with decodes' queries and weights as two e4m3 numbers each, which is as exact as bfloat16, with those
    of prompts as one. Shared pages are multiplied in float16.
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
        self.kv_dtype = kv_dtype or dtype
        self.fp8 = self.transposed = self.kv_dtype == torch.float8_e4m3fn
        least = CHUNK if self.fp8 else 16  # of what a product of matrices can be made of
        if page_size < least or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two from {least} on, got {page_size}")
        if head_dim > 256:
            raise ValueError(f"head_dim must be at most 256, got {head_dim}")
        self.group = num_heads // num_kv_heads
        self.block_d = max(least, triton.next_power_of_2(head_dim))
        self.scales = torch.ones(2, num_kv_heads, dtype=torch.float32, device=device)
        self.decode_tile, self.prefill_tile, self.prefix_tile = self._tiles()
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        )
        self._partial: dict[int, tuple[Tensor, Tensor]] = {}
        self._shared: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _tiles(self) -> tuple[Tile, Tile, Tile]:
        group = max(16, triton.next_power_of_2(self.group))
        if self.dtype == torch.float32 or self.block_d > 128:
            keys = min(32, self.page_size)
            return Tile(group, keys, 4, 2), Tile(max(32, group), keys, 4, 2), Tile(max(32, group), keys, 4, 2)
        keys, wide = min(64, self.page_size), self.block_d > 64
        if self.fp8:
            decode = Tile(max(8, triton.next_power_of_2(self.group)), keys, 4, 5)
            prefix, narrower = Tile(max(128, group), keys, 4, 3), Tile(64, keys, 4, 3, 168)
        else:
            decode = Tile(group, keys, 2 if wide else 1, 3)
            prefix, narrower = Tile(max(128, group), min(32, keys), 4, 3), Tile(64, min(32, keys), 4, 3, 128)
        return decode, narrower if wide and group <= 64 else prefix, prefix

    @cached_property
    def _shape(self) -> dict[str, object]:
        return {
            "KV_HEADS": self.num_kv_heads,
            "DIM": self.head_dim,
            "PAGE": self.page_size,
            "CHUNK": CHUNK,
        }

    @cached_property
    def _arithmetic(self) -> dict[str, object]:
        compute = tl.float16 if self.fp8 else tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32
        return {
            "GROUP": self.group,
            "TRANSPOSED": self.transposed,
            "COMPUTE": compute,
            "BLOCK_D": self.block_d,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
        }

    def allocate(self, num_layers: int, num_pages: int) -> list[Tensor]:
        shape = (num_layers, 2, num_pages, self.num_kv_heads, self.page_size * self.head_dim)
        return list(torch.empty(shape, dtype=self.kv_dtype, device=self.device).unbind())

    def by_head(self, caches: Sequence[Tensor]) -> list[Tensor]:
        first = caches[0]  # the others lie behind it, so that a page of all layers is copied at once
        together = first.as_strided((len(caches), *first.shape), (first.numel(), *first.stride()))
        return [together.permute(2, 3, 0, 1, 4)]

    def page_bytes(self, num_layers: int) -> int:
        return num_layers * 2 * self.page_size * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize

    def rope_write(
        self,
        qkv: Tensor | Unscaled,
        cos_sin: Tensor,
        batch: AttentionBatch,
        cache: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        q_out: Tensor,
    ) -> Tensor:
        qkv, rows, columns = in_parts(qkv)
        assert qkv.is_contiguous() and q_out.is_contiguous()
        batch = self._told_apart(batch)
        rope_write[(len(qkv),)](
            qkv, rows, columns, cos_sin, batch.positions, batch.slots, batch.counts, cache[0], cache[1], q_norm, k_norm,
            self.scales, eps, q_out,
            HEADS=self.num_heads, NORM=q_norm is not None, FP8=self.fp8, SCALE=rows is not None,
            BLOCK_H=triton.next_power_of_2(self.num_heads), BLOCK_KV=triton.next_power_of_2(self.num_kv_heads),
            BLOCK_HALF=triton.next_power_of_2(self.head_dim // 2), num_warps=4, **self._shape,
        )  # fmt: skip
        if self.fp8 and batch.prefills:
            write_values[(triton.cdiv(len(qkv), CHUNK), self.num_kv_heads)](
                qkv, rows, columns, batch.slots, batch.counts, cache[1], self.scales, len(qkv),
                HEADS=self.num_heads, SCALE=rows is not None, BLOCK_D=self.block_d, num_warps=4, **self._shape,
            )  # fmt: skip
        return q_out

    def attend(self, q: Tensor, batch: AttentionBatch, cache: Tensor, out: Tensor) -> Tensor:
        assert q.is_contiguous() and out.is_contiguous()
        batch = self._told_apart(batch)
        if batch.decodes:
            self._attend_decodes(q, batch, cache, out)
        if batch.prefills:
            self._attend_prefills(q, batch, cache, out)
        return out

    def _told_apart(self, batch: AttentionBatch) -> AttentionBatch:
        """Prefill is right for all sequences of a batch where nobody has told which are decodes."""
        if batch.counts is not None:
            return batch
        counts = torch.tensor([0, len(batch.context_lens)], dtype=torch.int32, device=self.device)
        return replace(batch, decodes=0, prefills=len(batch.context_lens), counts=counts)

    def _attend_decodes(self, q: Tensor, batch: AttentionBatch, cache: Tensor, out: Tensor) -> None:
        tile, sequences = self.decode_tile, batch.decodes
        splits = self.splits(sequences, batch.max_context_len)
        partial, lse = self._partials(sequences, splits) if splits > 1 else (out, out)
        cascades = batch.shared is not None and not self.window
        shared = self._attend_shared(q, batch, cache) if cascades else (out, out, out, out)
        arguments: list[Any] = [
            q, cache[0], cache[1], batch.page_table, batch.context_lens, batch.counts, out, partial, lse, self.scales,
            self.scale * _LOG2E, batch.page_table.stride(0), *shared,
        ]  # fmt: skip
        cut = dict(
            WINDOW=self.window or 0, SPLITS=splits, SHARERS=SHARERS if cascades else 0,
            BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        grid = sequences, self.num_kv_heads, splits
        if self.fp8:
            decode_fp8[grid](
                *arguments, GROUP=self.group, MEMBERS=tile.block_m, BLOCK_D=self.block_d, **cut, **self._shape
            )
        else:
            flash.decode[grid](*arguments, BLOCK_M=tile.block_m, **cut, **self._shape, **self._arithmetic)
        if splits > 1:
            flash.merge[(sequences, self.num_heads)](
                partial, lse, batch.counts, out, HEADS=self.num_heads, DIM=self.head_dim,
                SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=self.block_d, num_warps=1,
            )  # fmt: skip

    def _attend_shared(self, q: Tensor, batch: AttentionBatch, cache: Tensor) -> tuple[Tensor, ...]:
        """The pages that neighbours begin with: how many, and what decodes go on from."""
        tile, rows = self.prefix_tile, batch.decodes * self.num_heads
        size = 1 << (rows - 1).bit_length()
        if size not in self._shared:
            top, total = torch.empty(2, size, dtype=torch.float32, device=self.device)
            self._shared[size] = top, total, torch.empty(size, self.head_dim, dtype=torch.float32, device=self.device)
        queries = min(SHARERS, 1 << ((tile.block_m // self.group).bit_length() - 1))
        flash.prefix[(triton.cdiv(batch.decodes, queries), self.num_kv_heads)](
            q, cache[0], cache[1], batch.page_table, batch.counts, self.scales, self.scale * _LOG2E,
            batch.page_table.stride(0), batch.shared, *self._shared[size], SHARERS=SHARERS, QUERIES=queries,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps,
            **self._shape, **self._arithmetic,
        )  # fmt: skip
        return batch.shared, *self._shared[size]

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
        as_they_are = {"COMPUTE": tl.float8e4nv} if self.fp8 else {}
        flash.prefill[(tiles, self.num_kv_heads)](
            q, cache[0], cache[1], batch.page_table, batch.query_starts, batch.context_lens, batch.counts, out,
            self.scales, self.scale * _LOG2E, batch.page_table.stride(0),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps,
            maxnreg=tile.registers, WINDOW=self.window or 0, **self._shape, **self._arithmetic | as_they_are,
        )  # fmt: skip
