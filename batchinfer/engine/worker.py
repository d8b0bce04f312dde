"""A rank as a process: ``python -m batchinfer.engine.worker``, started by Pipeline, or by hand on another machine.

It is told everything through its link: which plan, which part of it, and then step after step. When the link ends,
whoever held the other end is gone, and so is the rank, whatever it was about to do.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from batchinfer.engine.balance import measure
from batchinfer.engine.comm import Arena, DistributedPeers, Peers, SharedPeers
from batchinfer.engine.kernels import SamplingBatch
from batchinfer.engine.layout import Layout
from batchinfer.engine.link import Link
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.scheduler import StepBatch
from batchinfer.engine.stage import Stage
from batchinfer.errors import BatchInferError

Inbox = queue.SimpleQueue  # of messages
LINK_FD, ARENA_FD = "BATCHINFER_LINK_FD", "BATCHINFER_ARENA_FD"  # environment variables


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the engine, which ends its ranks when it is ready to
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=int(os.environ[LINK_FD])))
    arena = os.environ.get(ARENA_FD)
    work(link, int(arena) if arena else None, orphaned=lambda: os._exit(0))


def work(link: Link, arena: int | None, orphaned: Callable[[], None]) -> None:
    """Be a rank until the link ends.

    Args:
        arena: file descriptor of the memory shared with the other ranks.
        orphaned: called when the link has ended, from another thread: whatever goes on here waits for nobody.
    """
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, inbox, orphaned), daemon=True).start()
    try:
        Worker(link, inbox, arena).serve()
    except OSError:  # the engine is gone
        orphaned()
    except Exception as error:
        expected = isinstance(error, BatchInferError)
        with contextlib.suppress(OSError):
            link.send("failed", error=type(error).__name__, message=str(error), expected=expected)
        if not expected:
            raise


def _listen(link: Link, inbox: Inbox, orphaned: Callable[[], None]) -> None:
    """Take messages in ahead of their time; None after the last."""
    try:
        while True:
            inbox.put(link.receive())
    except EOFError:
        orphaned()
        inbox.put(None)


class Worker:
    """One rank: opens its stage, then computes what it is told to, in the order in which it is told."""

    def __init__(self, link: Link, inbox: Inbox, arena: int | None) -> None:
        self.link = link
        self.inbox = inbox
        told = inbox.get().fields
        self.rank, self.layout = told["rank"], Layout(told["tp"], tuple(told["partition"]))
        plan = EnginePlan.load(told["plan"])
        torch.set_num_threads(told["threads"])
        if plan.device == "cuda":
            torch.cuda.set_device(told["device"])
        self.peers = self._join(told, plan, arena)
        if not all(self.layout.partition):
            self.layout = replace(self.layout, partition=self._measure(plan))
        self.stage = Stage(plan, told["kv_cache_gib"], self.layout.shard(plan.spec, self.rank), self.peers, self._agree)
        self.hidden_size = plan.spec.hidden_size
        self.before, self.after = self.rank - self.layout.tp, self.rank + self.layout.tp
        link.send("ready", page_size=self.stage.page_size, kernels=self.stage.kernels.name)

    def _join(self, told: dict[str, Any], plan: EnginePlan, arena: int | None) -> Peers:
        if arena is not None:
            shared = Arena(np.frombuffer(mmap.mmap(arena, 0), np.uint8))
            return SharedPeers(shared, self.layout, self.rank, told["deadline"], **told["sizes"])
        from torch.distributed import TCPStore

        host, port = told["store"]
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=told["deadline"]))
        return DistributedPeers(self.layout, self.rank, told["deadline"], store=store, device=torch.device(plan.device))

    def _measure(self, plan: EnginePlan) -> tuple[int, ...]:
        """Tell what layers, embedding and head cost here; learn who gets which."""
        self.link.send("costs", **asdict(measure(plan, self.layout.tp, self.rank % self.layout.tp)))
        return tuple(self.inbox.get().fields["partition"])

    def _agree(self, pages: int) -> int:
        """The fewest pages that any rank can hold."""
        self.link.send("pages", count=pages)
        return self.inbox.get().fields["count"]

    def serve(self) -> None:
        for step, number in self._steps():
            if self.stage.shard.first:
                inputs = torch.from_numpy(step.token_ids).to(self.stage.device)
            else:
                inputs = self.peers.receive(self.before)
            begun = time.perf_counter()
            out = self.stage.forward(step, inputs)
            tokens = {}
            if not self.stage.shard.last:
                self.peers.send(self.after, out)
            elif (chosen := self.stage.sample(step, out)) is not None:
                tokens = {"tokens": chosen}
            ended = time.perf_counter()
            spent = dict(begun=begun, ended=ended, sent=self.peers.sent, count=step.num_tokens)
            self.link.send("done", step=number, **spent, **tokens)

    def _steps(self) -> Iterator[tuple[StepBatch, int]]:
        """Each step when its turn comes; what it needs of the stage before is expected as soon as it is known."""
        known: deque[tuple[StepBatch, int]] = deque()
        while True:
            while not known or not self.inbox.empty():
                if (message := self.inbox.get()) is None:
                    return
                step = step_of(message.fields)
                if not self.stage.shard.first:
                    self.peers.expect(self.before, (step.num_tokens, self.hidden_size), torch.float32)
                known.append((step, message.fields["number"]))
            yield known.popleft()


def fields_of(step: StepBatch) -> dict[str, Any]:
    """A step as a message's fields; of the table of histories only the rows that are read."""
    told = {f.name: getattr(step, f.name) for f in fields(step) if f.name != "sampling"}
    how = {f.name: getattr(step.sampling, f.name) for f in fields(step.sampling)}
    if how["all_greedy"]:
        how = {name: value[:0] if isinstance(value, np.ndarray) else value for name, value in how.items()}
    else:
        read = np.flatnonzero(how["repetition_penalty"] != 1)
        rows, longest = how["history_rows"][read], how["history_lens"][read].max(initial=0)
        how["history"] = how["history"][rows, :longest]
        how["history_rows"] = np.zeros_like(how["history_rows"])
        how["history_rows"][read] = np.arange(len(read))
    return told | {f"sampling.{name}": value for name, value in how.items()}


def step_of(told: dict[str, Any]) -> StepBatch:
    how = SamplingBatch(**{f.name: told[f"sampling.{f.name}"] for f in fields(SamplingBatch)})
    return StepBatch(**{f.name: told[f.name] for f in fields(StepBatch) if f.name != "sampling"}, sampling=how)


if __name__ == "__main__":
    main()
