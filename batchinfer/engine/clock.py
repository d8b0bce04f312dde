"""Clock: when a device came to a point of its work, in seconds of ``time.perf_counter``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class HostClock:
    """A CPU's work is done when the call returns."""

    prompt = True  # whether a moment has passed as soon as it is there

    def now(self) -> Any:
        """A moment: here, in what the device has been given to do."""
        return time.perf_counter()

    def wait(self, moment: Any) -> None:
        """Until the device has come to it."""

    def seconds(self, moment: Any) -> float:
        """When it came to a moment that has passed."""
        return moment

    def beside(self, moment: Any) -> contextlib.AbstractContextManager[None]:
        """What is begun within runs beside all that was begun after ``moment``; what is begun later waits for it."""
        return contextlib.nullcontext()

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """What is begun within runs after all that was begun before, beside all that is begun later."""
        return contextlib.nullcontext()


class CudaClock(HostClock):
    """A GPU's work is done when it gets to it: moments are events in the current stream."""

    prompt = False

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._side = torch.cuda.Stream()
        self._zero, self._at = self.now(), time.perf_counter()
        self._zero.synchronize()

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def seconds(self, moment: torch.cuda.Event) -> float:
        return self._at + self._zero.elapsed_time(moment) / 1e3

    @contextlib.contextmanager
    def beside(self, moment: torch.cuda.Event) -> Iterator[None]:
        self._side.wait_event(moment)
        with torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream().wait_stream(self._side)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield


def best_seconds(work: Callable[[], object], device: torch.device, budget: float, least: int = 1) -> float:
    """The best of the calls of ``work`` that fit into ``budget`` seconds after one to warm up, and of ``least``."""

    def once() -> float:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    once()
    best, calls, until = float("inf"), 0, time.perf_counter() + budget
    while calls < least or time.perf_counter() < until:
        best, calls = min(best, once()), calls + 1
    return best
