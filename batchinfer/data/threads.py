"""The run's threads: how they end together, and how little they may hold between them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, Literal, Protocol, TypeVar

from batchinfer.log import line

POLL = 0.05  # seconds after which a waiting thread looks whether the run goes on


class Halt:
    """Whether the run goes on. Ends with the first failure of a thread, when someone asks it to stop, or by itself.

    Plain attributes without a lock, so that a signal handler may set them at any moment.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.ended = False
        self.reason = ""  # why it is stopping
        self.error: BaseException | None = None

    def stop(self, reason: str) -> None:
        """Take up no more rows, finish those under way. The first reason is the one that is told."""
        self.reason = self.reason or reason
        self.stopping = True

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error

    @property
    def now(self) -> bool:
        return self.stopping or self.ended or self.error is not None

    def check(self) -> None:
        """Raises: the first failure, as its thread raised it."""
        if self.error is not None:
            raise self.error


class StopNow(BaseException):
    """Raised in the main thread: end at once, with what is in the journal."""


class StopSignals:
    """SIGINT and SIGTERM, while entered, ask the run to stop; handlers are put back after. Nothing off the main thread.

    ``phase`` says what a signal does: ``"start"``, raise StopNow, as there is nothing to finish; ``"work"``, set
    ``halt.stopping``, and raise StopNow the second time; ``"end"``, nothing, as the run is about to end.
    """

    def __init__(self, halt: Halt) -> None:
        self.phase: Literal["start", "work", "end"] = "start"
        self._halt = halt
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on(self, number: int, *_: object) -> None:
        if self.phase == "end":
            return
        first = not self._halt.stopping
        self._halt.stop(signal.Signals(number).name)
        if self.phase == "work" and first:
            with contextlib.suppress(OSError):  # whoever read it may be gone
                os.write(2, line("stopping once the rows under way are finished; again to stop at once").encode())
            return
        self.phase = "end"
        raise StopNow


class Deadline:
    """Stops the run at a moment, while entered. One that is past stops it at once.

    Args:
        end: seconds since the epoch and what to say of them; None: never.
    """

    def __init__(self, halt: Halt, end: tuple[float, str] | None) -> None:
        self._halt, self._end = halt, end
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._wait, name="batchinfer-deadline", daemon=True)

    def __enter__(self) -> Deadline:
        if self._end is not None and not self._reached():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _wait(self) -> None:
        while not self._left.wait(min(30.0, max(0.0, self._end[0] - time.time()))):  # type: ignore[index]
            if self._reached():  # asked anew now and then, as a clock may be set and a machine may sleep
                return

    def _reached(self) -> bool:
        moment, why = self._end  # type: ignore[misc]
        if time.time() < moment:
            return False
        self._halt.stop(why)
        os.write(2, line(f"{why}, stopping once the rows under way are finished").encode())
        return True


class Worker(threading.Thread):
    """A thread whose failure halts the run; subclasses say what it does in ``work``."""

    def __init__(self, name: str, halt: Halt) -> None:
        super().__init__(name=f"batchinfer-{name}", daemon=True)
        self.halt = halt
        self.seconds: dict[str, float] = {}  # stage → time spent; written by this thread alone

    def work(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.halt.fail(error)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun


class Sized(Protocol):
    def __len__(self) -> int: ...


Chunk = TypeVar("Chunk", bound=Sized)


class Channel(Generic[Chunk]):
    """Chunks of rows on their way from one thread to another, bounded by rows and by weight."""

    def __init__(self, rows: int, weight: int, halt: Halt) -> None:
        self._most = (rows, weight)
        self._halt = halt
        self._chunks: deque[tuple[Chunk, int]] = deque()
        self._rows = self._weight = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, chunk: Chunk, weight: int) -> None:
        """Wait for room, then add. One chunk always fits; once the run halts chunks go nowhere."""
        with self._changed:
            while self._chunks and (self._rows >= self._most[0] or self._weight >= self._most[1]):
                if self._halt.now:
                    return
                self._changed.wait(POLL)
            self._chunks.append((chunk, weight))
            self._rows += len(chunk)
            self._weight += weight
            self._changed.notify_all()

    def close(self) -> None:
        """No chunk will follow."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def get(self, timeout: float) -> Chunk | None:
        """The next chunk; None if none is there after ``timeout`` seconds.

        Raises: EOFError once it is closed and empty.
        """
        with self._changed:
            if not self._chunks and not self._closed and timeout > 0:
                self._changed.wait(timeout)
            if self._chunks:
                chunk, weight = self._chunks.popleft()
                self._rows -= len(chunk)
                self._weight -= weight
                self._changed.notify_all()
                return chunk
            if self._closed:
                raise EOFError
            return None


class Window:
    """How much may be begun and not yet committed, in rows and bytes. Two units always fit, whatever their size."""

    def __init__(self, rows: int, size: int, halt: Halt) -> None:
        self._most = (rows, size)
        self._halt = halt
        self._units = self._rows = self._size = 0
        self._changed = threading.Condition()

    def enter(self, rows: int, size: int) -> bool:
        """Wait until a unit of that size may begin. False if the run halts first."""
        with self._changed:
            while self._units >= 2 and (self._rows + rows > self._most[0] or self._size + size > self._most[1]):
                if self._halt.now:
                    return False
                self._changed.wait(POLL)
            self._count(1, rows, size)
            return not self._halt.now

    def leave(self, rows: int, size: int) -> None:
        with self._changed:
            self._count(-1, -rows, -size)
            self._changed.notify_all()

    def _count(self, units: int, rows: int, size: int) -> None:
        self._units += units
        self._rows += rows
        self._size += size
