"""The operations in Triton, for NVIDIA GPUs; compiled on first use for the card they run on."""

from __future__ import annotations

from batchinfer.engine.kernels import Kernels
from batchinfer.engine.kernels.gpu.attention import GpuPagedAttention
from batchinfer.engine.kernels.gpu.elementwise import add_rms_norm, quantize, silu_mul
from batchinfer.engine.kernels.gpu.sampling import sample

KERNELS = Kernels("gpu", add_rms_norm, silu_mul, GpuPagedAttention, sample, quantize)
