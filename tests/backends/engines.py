"""Engines that go wrong on purpose, opened in a process of their own by name: ``tests.backends.engines:function``."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from batchinfer import pulse
from batchinfer.backends.echo import EchoBackend
from batchinfer.cache import cache_root
from batchinfer.errors import ModelError
from batchinfer.request import Request

POISON = 666  # a row that holds this token does harm


class Batching(EchoBackend):
    """Holds up to ``most`` rows at once, steps through them together, and answers one of them a step."""

    most = 8

    def __init__(self, folder):
        super().__init__(folder)
        self.held: deque[Request] = deque()

    def generate(self, requests):
        more = True
        while more or self.held:
            while more and len(self.held) < self.most:
                request = next(requests, "end")
                more = request != "end"
                if request is None or not more:
                    break
                self.held.append(request)
            self.step()
            if self.held:
                yield from super().generate(iter([self.held.popleft()]))

    def step(self):
        self._load.steps += 1


def poisoned(harm: Callable[[], None]) -> type[Batching]:
    class Poisoned(Batching):
        """Does ``harm`` in the step in which a poison row takes part, whatever else does."""

        def step(self):
            super().step()
            if any(POISON in row.prompt_token_ids for row in self.held):
                harm()

    return Poisoned


def _segfault():
    ctypes.string_at(0)


def _raise():
    raise RuntimeError("an illegal memory access was encountered")


HARMS = {
    "segfault": _segfault,
    "exit": lambda: os._exit(7),
    "oom": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "seize": lambda: ctypes.PyDLL(None).sleep(3600),  # lets no other thread of the process run
    "raise": _raise,
}


def _echo(kind: type[EchoBackend]) -> Callable:
    return lambda job, progress: kind(cache_root() / "byte-tokenizer")  # made by tests.echo_jobs


def __getattr__(name: str) -> Callable:
    """``segfault``, ``exit``, … open an engine to which a poison row does that."""
    if name in HARMS:
        return _echo(poisoned(HARMS[name]))
    raise AttributeError(name)


class Forgetful(EchoBackend):
    def generate(self, requests):
        return (answer for answer in super().generate(requests) if answer.key % 10)


class Lazy(EchoBackend):
    def generate(self, requests):
        return super().generate(next(requests) for _ in range(5))


class Slow(Batching):
    def step(self):
        time.sleep(0.01)
        super().step()


echo = _echo(EchoBackend)
slow = _echo(Slow)
forgetful = _echo(Forgetful)
lazy = _echo(Lazy)
batching = _echo(Batching)


def no_weights(job, progress):
    raise ModelError("no weights in /nowhere")


def broken(job, progress):
    return 1 / 0


def stillborn(job, progress):
    os._exit(9)


def endless(job, progress):
    threading.Event().wait()


def slow_but_alive(job, progress):
    for _ in range(20):
        time.sleep(0.15)
        pulse.beat()
    return echo(job, progress)


def environment(job, progress):
    backend = echo(job, progress)
    backend.fingerprint = dict(os.environ)
    return backend


def parent(job, progress):
    """Has a process of its own, as ranks are."""
    backend = batching(job, progress)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    backend.fingerprint = {"helper": helper.pid}
    return backend
