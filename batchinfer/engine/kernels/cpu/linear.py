"""Products with quantised weights in C++: how the weights are laid out, and the calls."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.kernels.cpu.library import library

CHANNELS = 16  # output channels of a block: the lanes of a vector
FORMS = {"int8": 0, "int4": 1, "fp8": 2}  # as in linear.cpp


def operators() -> ctypes.CDLL | None:
    """The library, if this CPU has the instructions that the products are made of (AVX512-VNNI and -BF16)."""
    made = library()
    return made if made is not None and made.quantized_linears() else None


def in_blocks(codes: Tensor, lane: int) -> Tensor:
    """``[N, K]`` → ``[N / 16, K / lane, 16, lane]``, zeros where N or K is no multiple."""
    channels, inputs = codes.shape
    padded = F.pad(codes.view(torch.uint8), (0, -inputs % lane, 0, -channels % CHANNELS))
    return padded.view(-1, CHANNELS, padded.shape[1] // lane, lane).transpose(1, 2).contiguous()


def channels_in_blocks(values: Tensor) -> Tensor:
    """float ``[N, groups]`` → float32 ``[N / 16, groups, 16]``, zeros where N is no multiple."""
    padded = F.pad(values.float(), (0, 0, 0, -values.shape[0] % CHANNELS))
    return padded.view(-1, CHANNELS, values.shape[1]).transpose(1, 2).contiguous()


class W8A8Product:
    """x float32 or bfloat16 ``[T, K]``, rounded to 8 bits a token, times int8 ``[N, K]``."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._operators = operators()
        self.shape = weight.shape
        self._codes = in_blocks(weight, 4)
        self._scale = channels_in_blocks(scale[:, None])
        # Activations are unsigned there, 128 too much: what that adds to the sums is taken off again.
        self._offset = (channels_in_blocks(weight.int().sum(1)[:, None].float()) * 128).int()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        channels, inputs = self.shape
        x = x.contiguous()
        y = torch.empty(len(x), channels, dtype=x.dtype)
        name = "linear_w8a8_bf16" if x.dtype == torch.bfloat16 else "linear_w8a8_f32"
        getattr(self._operators, name)(
            x.data_ptr(),
            self._codes.data_ptr(),
            self._scale.data_ptr(),
            self._offset.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            len(x),
            channels,
            inputs,
            torch.get_num_threads(),
        )
        return y


class WidenedProduct:
    """x ``[T, K]``, taken as bfloat16, times weights in fewer bits, which become bfloat16 a tile at a time."""

    def __init__(self, form: str, weight: Tensor, scale: Tensor, zero: Tensor | None = None, group: int = 0) -> None:
        """
        Args:
            weight: int8 or e4m3 ``[N, K]``, or uint8 ``[N, K / 2]`` with two 4-bit numbers a byte.
            scale, zero: ``[N, groups]``; one group where there is no ``zero``.
        """
        self._operators = operators()
        self._form, self._group = FORMS[form], group
        packed = form == "int4"
        self.shape = (weight.shape[0], weight.shape[1] * 2 if packed else weight.shape[1])
        self._codes = in_blocks(weight, 1 if packed else 2)
        self._scale = channels_in_blocks(scale)
        self._zero = None if zero is None else channels_in_blocks(zero)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        channels, inputs = self.shape
        dtype, x = x.dtype, x.bfloat16().contiguous()
        bias = None if bias is None else bias.bfloat16()
        y = torch.empty(len(x), channels, dtype=torch.bfloat16)
        self._operators.linear_widened_bf16(
            self._form,
            x.data_ptr(),
            self._codes.data_ptr(),
            self._scale.data_ptr(),
            None if self._zero is None else self._zero.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            len(x),
            channels,
            inputs,
            self._group,
            torch.get_num_threads(),
        )
        return y.to(dtype)
