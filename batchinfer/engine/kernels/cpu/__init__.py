"""The operators in C++, compiled on the user's machine for its own instruction set."""

from __future__ import annotations

import torch

from batchinfer.engine.kernels import Kernels
from batchinfer.engine.kernels.cpu.attention import SUFFIX, CpuPagedAttention
from batchinfer.engine.kernels.cpu.elementwise import make_add_rms_norm, make_silu_mul
from batchinfer.engine.kernels.cpu.layers import fuse
from batchinfer.engine.kernels.cpu.library import library
from batchinfer.engine.kernels.cpu.sampling import make_sample


def kernels(dtype: torch.dtype) -> Kernels | None:
    """The C++ kernels for float32 or bfloat16; None where they cannot be built."""
    operators = library()
    if operators is None:
        return None
    suffix = SUFFIX[dtype]
    return Kernels(
        name="cpu",
        add_rms_norm=make_add_rms_norm(operators, suffix),
        silu_mul=make_silu_mul(operators, suffix),
        attention=CpuPagedAttention,
        sample=make_sample(operators),
        fuse=fuse,
    )
