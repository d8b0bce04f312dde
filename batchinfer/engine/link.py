"""Link: messages between the engine and one of its ranks, over a stream socket. Arrays and JSON, no pickles."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

_SIZES = struct.Struct("<IQ")  # of the header and of the arrays behind it
_BUFFER = 4 << 20


@dataclass(frozen=True, slots=True)
class Message:
    kind: str
    fields: dict[str, Any]  # what JSON can hold, and numpy arrays


class Link:
    """One end. A message is sent as it is and arrives whole."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        if channel.family != socket.AF_UNIX:
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            channel.setsockopt(socket.SOL_SOCKET, option, _BUFFER)

    def fileno(self) -> int:
        return self._channel.fileno()

    def send(self, kind: str, **fields: Any) -> None:
        """
        Raises:
            OSError: the other end is gone.
        """
        self.send_encoded(encode(kind, **fields))

    def send_encoded(self, message: bytes) -> None:
        try:
            self._channel.sendall(message)
        except BaseException:  # half a message may have gone: nothing after it would be understood
            self.close()
            raise

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            EOFError: the other end is gone.
        """
        try:
            return self._receive()
        except BaseException:  # as above
            self.close()
            raise

    def _receive(self) -> Message:
        header_size, size = _SIZES.unpack(self._read(_SIZES.size))
        kind, fields = json.loads(self._read(header_size))
        arrays, place = self._read(size), 0
        for name, value in fields.items():
            if isinstance(value, dict) and "dtype" in value:
                dtype, shape = np.dtype(value["dtype"]), value["shape"]
                count = int(np.prod(shape))
                fields[name] = np.frombuffer(arrays, dtype, count, place).reshape(shape)
                place += count * dtype.itemsize
        return Message(kind, fields)

    def _read(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view, got = memoryview(buffer), 0
        while got < size:
            try:
                count = self._channel.recv_into(view[got:], size - got, socket.MSG_WAITALL)
            except OSError:
                count = 0
            if not count:
                raise EOFError
            got += count
        return buffer

    def close(self) -> None:
        self._channel.close()


def encode(kind: str, **fields: Any) -> bytes:
    """A message as it travels, for whoever sends it to many."""
    described, arrays = {}, []
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            described[name] = {"dtype": value.dtype.str, "shape": value.shape}
            arrays.append(np.ascontiguousarray(value).tobytes())
        else:
            described[name] = value
    header = json.dumps([kind, described]).encode()
    return b"".join([_SIZES.pack(len(header), sum(map(len, arrays))), header, *arrays])
