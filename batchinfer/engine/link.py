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
DEADLINE = 300.0  # seconds without a sign of life after which the other end counts as hung
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # a machine that vanished says no good-bye


@dataclass(frozen=True, slots=True)
class Message:
    kind: str
    fields: dict[str, Any]  # what JSON can hold, and numpy arrays


class Link:
    """One end. A message is sent as it is and arrives whole.

    One may be long in coming, but once begun it must move within the deadline, or the link is at its end.
    """

    def __init__(self, channel: socket.socket, deadline: float = DEADLINE) -> None:
        self._channel = channel
        if channel.family != socket.AF_UNIX:
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    channel.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        # Not settimeout(): one thread sends while another receives, and each direction waits for itself.
        patience = struct.pack("@ll", int(deadline), int(deadline % 1 * 1e6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            channel.setsockopt(socket.SOL_SOCKET, option, patience)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            channel.setsockopt(socket.SOL_SOCKET, option, _BUFFER)

    def fileno(self) -> int:
        return self._channel.fileno()

    def send(self, kind: str, **fields: Any) -> None:
        """
        Raises:
            OSError: the other end is gone, or takes nothing.
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
            EOFError: the other end is gone, or fell silent in the middle.
        """
        try:
            return self._receive()
        except BaseException:  # as above
            self.close()
            raise

    def _receive(self) -> Message:
        header_size, size = _SIZES.unpack(self._read(_SIZES.size, begun=False))
        kind, fields = json.loads(self._read(header_size))
        arrays, place = self._read(size), 0
        for name, value in fields.items():
            if isinstance(value, dict) and "dtype" in value:
                dtype, shape = np.dtype(value["dtype"]), value["shape"]
                count = int(np.prod(shape))
                fields[name] = np.frombuffer(arrays, dtype, count, place).reshape(shape)
                place += count * dtype.itemsize
        return Message(kind, fields)

    def _read(self, size: int, begun: bool = True) -> bytearray:
        buffer = bytearray(size)
        view, got = memoryview(buffer), 0
        while got < size:
            try:
                count = self._channel.recv_into(view[got:], size - got, socket.MSG_WAITALL)
            except BlockingIOError:
                if not (begun or got):
                    continue
                count = 0
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
