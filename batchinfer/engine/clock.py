"""Clock: when a device came to a point of its work, in seconds of ``time.perf_counter``."""

from __future__ import annotations

import time
from collections.abc import Callable
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


class CudaClock(HostClock):
    """A GPU's work is done when it gets to it: moments are events in the current stream."""

    prompt = False

    def __init__(self) -> None:
        torch.cuda.synchronize()
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
