"""Wire: messages between a run and the process of its engine, over a socket.

A message is a JSON object and, beside it, token ids as 64-bit integers: two lengths, then both. Nothing that arrives
can do more than be wrong: no code travels.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import traceback
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from batchinfer import errors
from batchinfer.errors import BatchInferError, EngineError
from batchinfer.request import Completion, Output, Request, SamplingParams

_LENGTHS = struct.Struct("<II")
_sampling = attrgetter(*SamplingParams.names())

Message = dict[str, Any]


class Wire:
    """One end. Without time limits, ``send`` may be called from several threads at once and ``receive`` from one.

    Args:
        patience: seconds in which the other end must take a message; None: for ever.
    """

    def __init__(self, end: socket.socket, patience: float | None = None) -> None:
        self._end = end
        self._patience = patience
        self._arrived = bytearray()
        self._sending = threading.Lock()

    def send(self, message: Message, ids: array[int] | None = None) -> None:
        """Raises: OSError, TimeoutError among them, if the other end does not take it; nothing can follow then."""
        text, beside = json.dumps(message, separators=(",", ":")).encode(), ids.tobytes() if ids else b""
        with self._sending:
            self._limit(self._patience)
            self._end.sendall(b"".join((_LENGTHS.pack(len(text), len(beside)), text, beside)))

    def receive(self, seconds: float | None = None) -> tuple[Message, array[int]] | None:
        """The next message; None if none has come after ``seconds``.

        Raises: EOFError when the other end is gone.
        """
        while True:
            if len(self._arrived) >= _LENGTHS.size:
                text, beside = _LENGTHS.unpack_from(self._arrived)
                whole = _LENGTHS.size + text + beside
                if len(self._arrived) >= whole:
                    frame = bytes(self._arrived[_LENGTHS.size : whole])
                    del self._arrived[:whole]
                    ids = array("q")
                    ids.frombytes(frame[text:])
                    return json.loads(frame[:text]), ids
            self._limit(seconds)
            try:
                more = self._end.recv(1 << 18)
            except (TimeoutError, BlockingIOError):
                return None
            except OSError:
                raise EOFError from None
            if not more:
                raise EOFError
            self._arrived += more

    def close(self) -> None:
        self._end.close()

    def _limit(self, seconds: float | None) -> None:
        if self._end.gettimeout() != seconds:
            self._end.settimeout(seconds)


# ---- what travels. A key stays at home: the number of a request stands for it.


def pack_requests(requests: Mapping[int, Request]) -> tuple[list[Any], array[int]]:
    ids = array("q")
    packed = []
    for number, request in requests.items():
        ids.extend(request.prompt_token_ids)
        packed.append([number, len(request.prompt_token_ids), _sampling(request.sampling)])
    return packed, ids


def unpack_requests(packed: Iterable[Any], ids: array[int]) -> Iterator[Request]:
    """The requests, with their numbers as keys."""
    begin = 0
    for number, length, sampling in packed:
        yield Request(number, ids[begin : begin + length].tolist(), SamplingParams(*sampling))
        begin += length


def pack_completions(completions: Sequence[Completion]) -> tuple[list[Any], array[int]]:
    ids = array("q")
    packed = []
    for done in completions:
        outputs = []
        for output in done.outputs:
            ids.extend(output.token_ids)
            outputs.append([output.text, len(output.token_ids), output.finish_reason])
        packed.append(
            [done.key, outputs, done.prompt_tokens, done.cached_tokens, done.error, done.retryable, done.skipped]
        )
    return packed, ids


def unpack_completions(
    packed: Iterable[Any], ids: array[int], key_of: Callable[[int], Hashable]
) -> Iterator[Completion]:
    begin = 0
    for number, outputs, *rest in packed:
        said = []
        for text, length, reason in outputs:
            said.append(Output(text, ids[begin : begin + length].tolist(), reason))
            begin += length
        yield Completion(key_of(number), tuple(said), *rest)


def pack_error(error: BaseException) -> Message:
    """What the other side must know to raise it, or to tell of it."""
    if isinstance(error, BatchInferError) and getattr(errors, type(error).__name__, None) is type(error):
        return {"error": type(error).__name__, "told": str(error)}
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {"error": "", "told": f"{type(error).__name__}: {error}", "trace": trace}


class Traceback(Exception):
    """Where an error of the other side was raised: the cause of the one that is raised here."""


def unpack_error(message: Message) -> BatchInferError:
    """The error as it was, or as an EngineError if nobody expected it."""
    if message["error"]:
        return getattr(errors, message["error"])(message["told"])
    error = EngineError(f"the engine cannot be opened: {message['told']}")
    error.__cause__ = Traceback(message["trace"])
    return error
