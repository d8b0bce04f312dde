"""Worker: an engine alone in a process, exec'd by child.Child as ``python -m batchinfer.backends.worker FD FD``.

Over a socket it is told what to open, says what it opened, and then pulls requests and sends completions. It ends, with
all that it started, when the other end of its lifeline, a pipe, is closed: it never outlives the run it works for.

    from the run                                     from the worker
    {"opener": …, "job": …, "progress": …, …}        {"opened": {…}} or {"error": …, "told": …}
    {"begin": true}, once for each generate()        {"wants": n}, answered by rows each time
    {"rows": […], "end": false}                      {"done": […], "load": {…}}, {"ended": true} when it is at its end
    {"close": true}                                  {"beats": n} or {"error": …, "told": …} at any time
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict

from batchinfer import pulse
from batchinfer.backends.base import Backend
from batchinfer.backends.wire import Message, Wire, pack_completions, pack_error, unpack_requests
from batchinfer.host import peak_rss
from batchinfer.job import Job
from batchinfer.request import Completion, Load, Request

AHEAD = 16  # requests that wait here for the engine, or a quarter of what it holds if that is more
PATIENCE = (0.002, 0.05)  # seconds that an engine waits for the run's answer, at work and with nothing to do
GATHER = 0.005  # seconds for which finished rows are gathered into a message
BEAT = 0.5  # seconds between two looks at what the engine does


class Worker:
    """The engine's side of the conversation. One thread drives the engine, one reads, one tells."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._commands: deque[Message] = deque()
        self._rows: deque[Request] = deque()  # sent ahead, not pulled yet
        self._held = 0  # by the engine
        self._asked = False  # for rows; the answer has not come
        self._end = False  # no row will follow in this generate()
        self._changed = threading.Condition()
        self._finished: deque[Completion] = deque()
        self._news = threading.Event()
        self._telling = threading.Lock()  # completions leave in order, and none after "ended"
        self._backend: Backend | None = None
        self._load: Load | None = None  # last told

    def serve(self) -> None:
        """Open what the first message names, and work for it until "close"."""
        hello, _ = self._wire.receive()  # type: ignore[misc]
        threading.Thread(target=self._read, name="batchinfer-worker-read", daemon=True).start()
        threading.Thread(target=self._tell, name="batchinfer-worker-tell", daemon=True).start()
        module, name = hello["opener"].split(":")
        backend = getattr(importlib.import_module(module), name)(Job.from_dict(hello["job"]), hello["progress"])
        self._backend = backend
        opened = {"tokenizer_dir": str(backend.tokenizer_dir), "max_seq_len": backend.max_seq_len}
        self._wire.send({"opened": opened | {"fingerprint": backend.fingerprint}})
        while "close" not in self._next_command():
            for completion in backend.generate(self._requests()):
                self._held -= 1
                self._finished.append(completion)
                if not self._news.is_set():
                    self._news.set()
            self._report()
            self._wire.send({"ended": True})
        backend.close()

    # ---- the thread that drives the engine

    def _next_command(self) -> Message:
        with self._changed:
            self._changed.wait_for(lambda: self._commands)
            self._end = False
            return self._commands.popleft()

    def _requests(self) -> Iterator[Request | None]:
        """The engine's end of the line. An engine that finds nothing waits for the run's word, and no longer."""
        while True:
            most = max(AHEAD, self._held // 4)
            if len(self._rows) <= most // 2 and not self._asked and not self._end:
                self._asked = True
                self._wire.send({"wants": most - len(self._rows)})
            if not self._rows and not self._end:
                with self._changed:
                    self._changed.wait_for(lambda: self._rows or not self._asked, PATIENCE[not self._held])
            if self._rows:
                self._held += 1
                yield self._rows.popleft()
            elif self._end:
                return
            else:
                yield None

    # ---- the thread that reads

    def _read(self) -> None:
        try:
            while True:
                message, ids = self._wire.receive()  # type: ignore[misc]
                with self._changed:
                    if "rows" in message:
                        self._rows.extend(unpack_requests(message["rows"], ids))
                        self._end = message["end"]
                        self._asked = False
                    else:
                        self._commands.append(message)
                    self._changed.notify()
        except EOFError:
            """Whoever we work for is gone or about to end us."""

    # ---- the thread that tells

    def _tell(self) -> None:
        """Send what is finished, and what the engine does if that has changed: an engine that hangs is silent."""
        beats = 0
        try:
            while True:
                if self._news.wait(BEAT):
                    time.sleep(GATHER)
                    self._news.clear()
                    self._report()
                elif self._backend is not None:
                    if self._backend.load() != self._load:
                        self._report()
                elif pulse.beats != beats:
                    beats = pulse.beats
                    self._wire.send({"beats": beats})
        except OSError:
            """The other end is gone, which the reading thread finds out."""
        except BaseException as error:
            self.fail(error)

    def _report(self) -> None:
        with self._telling:
            packed, ids = pack_completions([self._finished.popleft() for _ in range(len(self._finished))])
            self._load = deepcopy(self._backend.load())  # type: ignore[union-attr]
            load = asdict(self._load)
            self._wire.send({"done": packed, "load": load | {"peak_rss": load["peak_rss"] or peak_rss()}}, ids)

    def fail(self, error: BaseException) -> None:
        """Tell why the engine is of no use any more, after all that it did finish, and go."""
        with contextlib.suppress(Exception):
            self._report()
        with contextlib.suppress(OSError):
            self._wire.send(pack_error(error))
        os._exit(1)


def guard(lifeline: int, wire: int) -> None:
    """Leave a process beside this one that kills the group with the run, though this one were stopped or hung."""
    if os.fork() == 0:
        os.close(wire)
        os.read(lifeline, 1)  # nothing is ever written: it returns when the other end is gone
        os.killpg(0, signal.SIGKILL)
    os.close(lifeline)


def main() -> None:
    wire, lifeline = map(int, sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run, which drains us; a group gets them all at once
        signal.signal(number, signal.SIG_IGN)
    guard(lifeline, wire)
    worker = Worker(Wire(socket.socket(fileno=wire)))
    try:
        worker.serve()
    except BaseException as error:
        worker.fail(error)
    os._exit(0)  # an engine's libraries take their time to say good-bye, or do not come to an end


if __name__ == "__main__":
    main()
