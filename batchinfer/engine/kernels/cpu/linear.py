"""Products in C++: how the weights are laid out, and the calls."""

from __future__ import annotations

import ctypes
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.kernels.cpu.library import library

CHANNELS = 16  # output channels of a block: the lanes of a vector
SHELF = 64 * 2**20  # bytes of memory that weights are placed in together
FORMS = {"int8": 0, "int4": 1, "fp8": 2}  # as in widened.cpp


def operators() -> ctypes.CDLL | None:
    """The library, if this CPU has the instructions that the products are made of (AVX512-VNNI and -BF16)."""
    made = library()
    return made if made is not None and made.dot_products() else None


def in_blocks(codes: Tensor, lane: int) -> Tensor:
    """``[N, K]`` → ``[N / 16, K / lane, 16, lane]``, zeros where N or K is no multiple."""
    codes = codes.view(torch.uint8)
    channels, inputs = codes.shape
    missing = (0, -inputs % lane, 0, -channels % CHANNELS)
    padded = F.pad(codes, missing) if any(missing) else codes
    return on_shelf(padded.view(-1, CHANNELS, padded.shape[1] // lane, lane).transpose(1, 2))


def on_shelf(weight: Tensor) -> Tensor:
    """A contiguous copy of it beside others, in huge pages: read once a step, small ones miss the TLB all the time."""
    global _shelf
    size = -(-weight.nbytes // 64) * 64
    with _placing:
        if size > len(_shelf):
            _shelf = torch.empty(max(size, SHELF), dtype=torch.uint8)
            library().want_huge_pages(_shelf.data_ptr(), len(_shelf))
        place, _shelf = _shelf[: weight.nbytes], _shelf[size:]
    return place.view(weight.dtype).view(weight.shape).copy_(weight)


_shelf = torch.empty(0, dtype=torch.uint8)  # what is left of the last
_placing = threading.Lock()


def channels_in_blocks(values: Tensor) -> Tensor:
    """float ``[N, groups]`` → float32 ``[N / 16, groups, 16]``, zeros where N is no multiple."""
    padded = F.pad(values.float(), (0, 0, 0, -values.shape[0] % CHANNELS))
    return padded.view(-1, CHANNELS, values.shape[1]).transpose(1, 2).contiguous()


class Matrix(ctypes.Structure):
    """Weights in blocks, as the operators take them."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class Product:
    """x ``[T, K]`` times ``[N, K]`` in blocks, plus bias ``[N]``; ``held`` are the fields of ``Matrix``, in order."""

    def __init__(self, shape: torch.Size, *held: Tensor | None) -> None:
        self._held = held
        self.matrix = Matrix(*(None if tensor is None else tensor.data_ptr() for tensor in held), *shape)
        self._matrix_at = ctypes.addressof(self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        return self.into(x, torch.empty(len(x), self.matrix.n, dtype=x.dtype))

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """The product, in ``out [T, N]``."""
        return self._into(x, out, False)

    def gated(self, x: Tensor, out: Tensor) -> Tensor:
        """``out [T, N / 2]``: silu of the first half of the channels times the others. N is a multiple of 32."""
        return self._into(x, out, True)

    def _into(self, x: Tensor, out: Tensor, gated: bool) -> Tensor:
        x = x.contiguous()
        assert out.is_contiguous() and x.dtype == out.dtype
        threads = torch.get_num_threads()
        self._operators[x.dtype](self._matrix_at, x.data_ptr(), out.data_ptr(), len(x), gated, threads)
        return out


class BFloat16Product(Product):
    """bfloat16 times bfloat16; K is even."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._codes = in_blocks(weight, 4)
        super().__init__(weight.shape, self._codes, None, None, bias)
        self._operators = {torch.bfloat16: operators().linear_bf16}

    def rows(self, channels: Tensor) -> Tensor:
        """Those rows of the weight, bfloat16 ``[len(channels), K]``."""
        pairs = self._codes.view(torch.int32)[channels // CHANNELS, :, channels % CHANNELS, 0]
        return pairs.contiguous().view(torch.bfloat16)


class W8A8Product(Product):
    """float32 or bfloat16, rounded to 8 bits a token, times int8."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        # Activations are unsigned there, 128 too much: what that adds to the sums is taken off again.
        offset = (channels_in_blocks(weight.sum(1, dtype=torch.int32)[:, None].float()) * 128).int()
        super().__init__(weight.shape, in_blocks(weight, 4), channels_in_blocks(scale[:, None]), offset, bias)
        made = operators()
        self._operators = {torch.float32: made.linear_w8a8_f32, torch.bfloat16: made.linear_w8a8_bf16}


class WidenedProduct:
    """float32 or bfloat16 times weights in fewer bits, which become the same a tile at a time; K is even."""

    def __init__(self, form: str, weight: Tensor, scale: Tensor, zero: Tensor | None = None, group: int = 0) -> None:
        """
        Args:
            weight: int8 or e4m3 ``[N, K]``, or uint8 ``[N, K / 2]`` with two 4-bit numbers a byte.
            scale, zero: ``[N, groups]``; one group where there is no ``zero``.
        """
        made = operators()
        self._operators = {torch.float32: made.linear_widened_f32, torch.bfloat16: made.linear_widened_bf16}
        self._form, self._group = FORMS[form], group
        packed = form == "int4"
        self.shape = (weight.shape[0], weight.shape[1] * 2 if packed else weight.shape[1])
        self._codes = in_blocks(weight, 1 if packed else 2)
        self._scale = channels_in_blocks(scale)
        self._zero = None if zero is None else channels_in_blocks(zero)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        channels, inputs = self.shape
        x = x.contiguous()
        bias = None if bias is None else bias.to(x.dtype)
        y = torch.empty(len(x), channels, dtype=x.dtype)
        self._operators[x.dtype](
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
        return y
