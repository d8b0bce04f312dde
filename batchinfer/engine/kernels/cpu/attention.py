"""Paged attention in C++; the cache's layout is in ``paged.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer.engine.kernels.attention import AttentionBatch, PagedAttention
from batchinfer.engine.kernels.cpu.library import library

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
MAX_HEAD_DIM = 512  # as in paged.h
BLOCK = 256  # keys a softmax block, as in attention.cpp


class CpuPagedAttention(PagedAttention):
    """A cache is one tensor ``[pages, page_bytes]`` of bytes.

    Results are the same bits whichever rows share the call and however many threads serve it. An instance belongs to
    one calling thread.
    """

    page_size = 16  # one AVX-512 vector of keys; small, so that little of a shared prefix is computed again

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
        super().__init__(num_heads, num_kv_heads, head_dim, page_size, window, dtype, device, kv_dtype)
        if page_size % 16 or BLOCK % page_size:
            raise ValueError(f"page_size must be 16, 32, 64, 128 or 256, got {page_size}")
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}")
        operators, suffix = library(), SUFFIX[dtype] + ("_int8" if self.kv_dtype == torch.int8 else "")
        if operators is None:
            raise RuntimeError("the CPU kernels could not be built; use TorchPagedAttention")
        self._shape = _Shape(num_heads, num_kv_heads, head_dim, page_size, window or 0, self.scale)
        self.shape_at = ctypes.addressof(self._shape)
        self._rope_write = getattr(operators, f"rope_write_{suffix}")
        self._attend = getattr(operators, f"attend_{suffix}")
        self._want_huge_pages = operators.want_huge_pages
        self._page_bytes = getattr(operators, f"page_bytes_{suffix}")(self.shape_at)
        self._batch: AttentionBatch | None = None
        self._batch_struct = _Batch()
        self._batch_at = ctypes.addressof(self._batch_struct)

    def allocate(self, num_layers: int, num_pages: int) -> list[Tensor]:
        caches = [torch.empty(num_pages, self._page_bytes, dtype=torch.uint8) for _ in range(num_layers)]
        for cache in caches:
            self._want_huge_pages(cache.data_ptr(), cache.nbytes)
        return caches

    def page_bytes(self, num_layers: int) -> int:
        return num_layers * self._page_bytes

    def by_head(self, caches: Sequence[Tensor]) -> list[Tensor]:
        return [cache.view(len(cache), self.num_kv_heads, -1) for cache in caches]

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
        assert qkv.is_contiguous() and q_out.is_contiguous() and qkv.dtype == q_out.dtype == self.dtype
        self._rope_write(
            self.shape_at,
            self.batch_at(batch),
            qkv.data_ptr(),
            cos_sin.data_ptr(),
            cache.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            eps,
            q_out.data_ptr(),
            torch.get_num_threads(),
        )
        return q_out

    def attend(self, q: Tensor, batch: AttentionBatch, cache: Tensor, out: Tensor) -> Tensor:
        assert q.is_contiguous() and out.is_contiguous() and q.dtype == out.dtype == self.dtype
        self._attend(
            self.shape_at,
            self.batch_at(batch),
            q.data_ptr(),
            cache.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def batch_at(self, batch: AttentionBatch) -> int:
        """Address of the batch as a C struct: made once a step, used by every layer."""
        if batch is not self._batch:
            self._batch_struct.fill(batch)
            self._batch = batch  # also keeps its tensors alive
        return self._batch_at


class _Shape(ctypes.Structure):
    _fields_ = (
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("page_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("max_query_len", ctypes.c_int64),
    )

    def fill(self, batch: AttentionBatch) -> None:
        for name in ("positions", "slots", "query_starts", "context_lens", "page_table"):
            tensor = getattr(batch, name)
            if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
                raise TypeError(f"{name} must be int32 with a last stride of 1, got {tensor.dtype}, {tensor.stride()}")
            setattr(self, name, tensor.data_ptr())
        self.table_stride = batch.page_table.stride(0)
        self.tokens = batch.positions.numel()
        self.sequences = batch.context_lens.numel()
        self.max_query_len = batch.max_query_len
