"""Sampling in C++, with the signature of its reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from batchinfer.engine.kernels.sampling import SamplingBatch

_COLUMNS = {  # in the order of the C struct
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "seed": np.int64,
    "index": np.int32,
    "position": np.int64,
    "history": np.int32,
    "history_rows": np.int32,
    "history_lens": np.int32,
}


class _Sampling(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _COLUMNS),
        ("history_stride", ctypes.c_int64),
        ("all_greedy", ctypes.c_int32),
    )


def make_sample(operators: ctypes.CDLL) -> Callable[[Tensor, SamplingBatch], Tensor]:
    """Of float32 or bfloat16 logits, whichever come."""
    kernels = {torch.float32: operators.sample_f32, torch.bfloat16: operators.sample_bf16}

    def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
        assert logits.stride(1) == 1 and logits.device.type == "cpu"
        rows, vocabulary = logits.shape
        how = _Sampling(all_greedy=batch.all_greedy)
        if not batch.all_greedy:
            for name, dtype in _COLUMNS.items():
                column = getattr(batch, name)
                if column.dtype.itemsize != np.dtype(dtype).itemsize or column.strides[-1] != column.itemsize:
                    raise TypeError(
                        f"{name} must be contiguous {np.dtype(dtype)}, got {column.dtype}, {column.strides}"
                    )
                setattr(how, name, column.ctypes.data)
            how.history_stride = batch.history.strides[0] // batch.history.itemsize
        tokens = torch.empty(rows, dtype=torch.int32)
        kernels[logits.dtype](
            logits.data_ptr(),
            logits.stride(0),
            rows,
            vocabulary,
            ctypes.addressof(how),
            tokens.data_ptr(),
            torch.get_num_threads(),
        )
        return tokens

    return sample
