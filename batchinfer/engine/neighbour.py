"""Neighbour: memory of another GPU of this machine, written to from here, by the driver's API.

Its copy engines carry the bytes over the link between the two while the processors of both compute. Addresses are
plain numbers; work is given to torch's current stream.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_size_t, c_uint, c_uint64, c_void_p

import torch
from torch import Tensor

from batchinfer.errors import EngineError

_LONGEST_PITCH = 2**31 - 1  # bytes from row to row of one copy
_UNIFIED = 4  # memory that is known by its address alone
_PEER_ACCESS = 1  # flag: make the link ready


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _Copy(ctypes.Structure):
    _fields_ = (
        *((f"source_{name}", kind) for name, kind in (("x", c_size_t), ("y", c_size_t), ("type", c_uint))),
        *((f"source_{name}", c_uint64) for name in ("host", "device", "array", "pitch")),
        *((f"target_{name}", kind) for name, kind in (("x", c_size_t), ("y", c_size_t), ("type", c_uint))),
        *((f"target_{name}", c_uint64) for name in ("host", "device", "array", "pitch")),
        ("width", c_size_t),
        ("height", c_size_t),
    )


def show(x: Tensor) -> str:
    """What another process needs to see ``x``, and what it holds by now."""
    torch.cuda.synchronize()
    base, size, handle = c_uint64(), c_size_t(), _Handle()
    _call("cuMemGetAddressRange_v2", byref(base), byref(size), c_uint64(x.data_ptr()))
    _call("cuIpcGetMemHandle", byref(handle), base)
    return f"{bytes(handle.reserved).hex()} {x.data_ptr() - base.value}"


def see(shown: str) -> int:
    """The address, in this process, of a tensor that another one shows."""
    handle, offset = shown.split()
    return _opened(handle) + int(offset)


def copy_rows(target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
    """Begin to copy ``rows`` of ``width`` bytes, that lie so many bytes from each other."""
    if rows > 1 and max(target_pitch, source_pitch) > _LONGEST_PITCH:
        for row in range(rows):
            copy_rows(target + row * target_pitch, width, source + row * source_pitch, width, width, 1)
        return
    told = _Copy(
        source_type=_UNIFIED, source_device=source, source_pitch=source_pitch,
        target_type=_UNIFIED, target_device=target, target_pitch=target_pitch, width=width, height=rows,
    )  # fmt: skip
    _call("cuMemcpy2DAsync_v2", byref(told), _stream())


def raise_to(address: int, value: int) -> None:
    """Set a 32-bit number, behind everything that the stream was given before."""
    _call("cuStreamWriteValue32_v2", _stream(), c_uint64(address), c_uint(value), c_uint(0))


def wait_for(address: int, value: int) -> None:
    """Have the stream wait until a 32-bit number here has come to ``value``."""
    _call("cuStreamWaitValue32_v2", _stream(), c_uint64(address), c_uint(value), c_uint(0))


@functools.cache  # the driver opens none twice
def _opened(handle: str) -> int:
    address, as_given = c_uint64(), _Handle.from_buffer_copy(bytes.fromhex(handle))
    _call("cuIpcOpenMemHandle_v2", byref(address), as_given, c_uint(_PEER_ACCESS))
    return address.value


def _stream() -> c_void_p:
    return c_void_p(torch.cuda.current_stream().cuda_stream)


def _call(name: str, *arguments: object) -> None:
    try:
        code: int = getattr(_driver(), name)(*arguments)
    except (OSError, AttributeError) as error:
        raise EngineError(f"no {name} of the GPU's driver here: {error}") from None
    if code:
        raise EngineError(f"the GPU's driver refused {name}: CUDA error {code}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
