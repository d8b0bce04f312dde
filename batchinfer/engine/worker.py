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
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch

from batchinfer.engine.balance import measure
from batchinfer.engine.clock import CudaClock, HostClock
from batchinfer.engine.comm import Arena, DistributedPeers, Peers, SharedPeers, Sizes
from batchinfer.engine.layout import Layout, Piece, World
from batchinfer.engine.link import DEADLINE, Link, Message
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.stage import Stage, Tokens, to_host
from batchinfer.engine.step import StepBatch
from batchinfer.engine.transfer import Direct, Parcels, Transfer, all_agree, pages_of
from batchinfer.errors import BatchInferError, EngineError

Inbox = queue.SimpleQueue  # of messages
LINK_FD, ARENA_FD = "BATCHINFER_LINK_FD", "BATCHINFER_ARENA_FD"  # environment variables


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the engine, which ends its ranks when it is ready to
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=int(os.environ[LINK_FD])) if LINK_FD in os.environ else _rendezvous())
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
        _tell_failure(link, error)
        if not isinstance(error, BatchInferError):
            raise


def _tell_failure(link: Link, error: Exception) -> None:
    expected = isinstance(error, BatchInferError)
    with contextlib.suppress(OSError):
        link.send("failed", error=type(error).__name__, message=str(error), expected=expected)


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
        self.rank = told["rank"]
        self.world = World(tuple(Layout(tp, tuple(dealt), *more) for tp, dealt, *more in told["layouts"]))
        self.layout = self.world.layout(self.rank)
        plan = EnginePlan.load(told["plan"])
        torch.set_num_threads(told["threads"])
        if plan.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))
        pieces = self.world.pieces(plan.spec)
        self.peers = self._join(told, plan, pieces, arena)
        if not all(self.layout.partition):
            self.layout = replace(self.layout, partition=self._measure(plan))
        self.stage = Stage(plan, told["kv_cache_gib"], self.layout.shard(plan.spec, self.rank), self.peers, self._agree)
        self.hidden_size = plan.spec.hidden_size
        self.clock = CudaClock() if plan.device == "cuda" else HostClock()
        self.transfer = self._transfer(told, plan, pieces)
        self.sends_pages = any(piece.source == self.rank for piece in pieces)
        self.done: queue.SimpleQueue[tuple] = queue.SimpleQueue()  # and not told yet
        if not self.clock.prompt:
            threading.Thread(target=self._tell_all, daemon=True).start()
        self.before, self.after = self.rank - self.layout.tp, self.rank + self.layout.tp
        feedback = self.world.feedback()
        self.listeners = [to for sampler, to in feedback if sampler == self.rank]
        self.listens = any(to == self.rank for _, to in feedback)
        self.depth = told["depth"]
        self.owed: deque[Launch] = deque()  # steps whose tokens are not taken in yet
        self.due: deque[tuple[int, np.ndarray]] = deque()  # steps whose pages are not taken in yet, and which pages
        link.send("ready", page_size=self.stage.page_size, kernels=self.stage.kernels.name)

    def _join(self, told: dict[str, Any], plan: EnginePlan, pieces: list[Piece], arena: int | None) -> Peers:
        deadline = told["deadline"]
        if arena is not None:
            shared = Arena(np.frombuffer(mmap.mmap(arena, 0), np.uint8))
            transfers = [(piece.source, piece.target) for piece in pieces]
            return SharedPeers(shared, self.world, transfers, self.rank, deadline, Sizes(**told["sizes"]))
        import torch.distributed as dist

        host, port, prefix = told["store"]
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=deadline))
        self.store, device = dist.PrefixStore(prefix, store), torch.device(plan.device)
        return DistributedPeers(self.world, self.rank, deadline, self.store, device)

    def _transfer(self, told: dict[str, Any], plan: EnginePlan, pieces: list[Piece]) -> Transfer:
        reach, direct = torch.cuda.can_device_access_peer, None
        if plan.device == "cuda" and told["together"] and pieces and all(reach(a, b) for a, b, *_ in pieces):
            with contextlib.suppress(EngineError):
                direct = Direct(self.stage, self.peers, self.world, plan.spec, self.rank, self.clock, self.store)
            if all_agree(self.store, self.rank, self.world.size, direct is not None):
                return direct
        return Parcels(self.stage, self.peers, pieces, self.rank, self.clock)

    def _measure(self, plan: EnginePlan) -> tuple[int, ...]:
        """Tell what layers, embedding and head cost here; learn who gets which."""
        costs = measure(plan, self.layout.tp, self.layout.share(self.rank))
        if plan.device == "cuda":
            torch.cuda.empty_cache()  # of it the stage is to have all
        self.link.send("costs", **asdict(costs))
        return tuple(self.inbox.get().fields["partition"])

    def _agree(self, pages: int) -> int:
        """The fewest pages that any rank can hold."""
        self.link.send("pages", count=pages)
        return self.inbox.get().fields["count"]

    def serve(self) -> None:
        for message in self._messages():
            told = message.fields
            if message.kind == "pages":
                self.due.append((told["number"], told["pages"]))
                self.transfer.allow()
            elif message.kind == "take":
                self._take_pages(told["number"])
            elif message.kind == "head":
                self._settle(told["number"])
            else:
                self._compute(Launch(told["number"], StepBatch.of_fields(told), told["head_on_first"]))

    def _take_pages(self, number: int) -> None:
        """What the steps up to this one have written; some may be of a run that was left in the middle."""
        while self.due and self.due[0][0] <= number:
            _, pages = self.due.popleft()
            self._tell_moved(self.transfer.take(pages), pages)

    def _tell_moved(self, taken: tuple[Any, Any] | None, pages: np.ndarray) -> None:
        if taken is not None:
            begun, ended = taken
            self._tell("moved", begun, ended=ended, pages=len(pages))

    def _compute(self, launch: Launch) -> None:
        step, shard = launch.step, self.stage.shard
        if self.listens:
            self._learn(launch)
        inputs = None if shard.first else self.peers.receive(self.before)
        begun = self.clock.now()
        out = self.stage.forward(step, inputs)
        if not shard.last:
            self.peers.send(self.after, out)
        elif launch.head_on_first:
            self.peers.send(self.listeners[0], out)
        self._tell("done", begun, step=launch.number, sent=self.peers.sent, count=step.num_tokens)
        if shard.last and not launch.head_on_first:
            self._head(launch, out)
        if self.sends_pages:
            pages = pages_of(step, self.stage.page_size)
            self._tell_moved(self.transfer.send(pages), pages)

    def _head(self, launch: Launch, residual: torch.Tensor) -> None:
        """Choose tokens; whoever begins the next step with them has them at once, before the engine has."""
        begun = self.clock.now()
        chosen = self.stage.sample(launch.step, residual)
        if chosen is not None and len(chosen):
            for listener in self.listeners:
                self.peers.send(listener, chosen)
            if self.stage.shard.first:
                self.stage.learn(launch.step.sampled_rows, chosen)
        tokens = None if chosen is None else to_host(chosen)
        about = dict(step=launch.number, sent=self.peers.sent, samples=len(launch.step.sampled))
        self._tell("head", begun, tokens, **about)

    def _learn(self, launch: Launch) -> None:
        """Take in the tokens that a step goes on from, and those that the engine has had, lest they pile up."""
        missing = launch.step.rows[launch.step.unknown]
        needed = [owed.number for owed in self.owed if np.isin(missing, owed.step.sampled_rows).any()]
        if len(self.owed) >= self.depth:
            needed.append(self.owed[0].number)
        self._settle(max(needed, default=-1))
        if len(launch.step.sampled):
            self.owed.append(launch)

    def _settle(self, number: int) -> None:
        """Take in the tokens of steps up to this one, or choose them, where the last stage leaves that to this one."""
        while self.owed and self.owed[0].number <= number:
            launch, told = self.owed.popleft(), self.peers.receive(self.layout.sampler)
            if launch.head_on_first:
                self._head(launch, told)
            else:
                self.stage.learn(launch.step.sampled_rows, told)

    def _tell(self, kind: str, begun: Any, tokens: Tokens | None = None, ended: Any = None, **about: Any) -> None:
        """Tell what was done since ``begun``, until now unless told otherwise, as soon as the device has done it."""
        done = kind, begun, ended or self.clock.now(), tokens, about
        self._tell_now(*done) if self.clock.prompt else self.done.put(done)

    def _tell_now(self, kind: str, begun: Any, ended: Any, tokens: Tokens | None, about: dict[str, Any]) -> None:
        self.clock.wait(ended)
        if tokens is not None:
            about["tokens"] = tokens()
        self.link.send(kind, begun=self.clock.seconds(begun), ended=self.clock.seconds(ended), **about)

    def _tell_all(self) -> None:
        """The same from a thread of its own, while the device is given the next steps."""
        try:
            while True:
                self._tell_now(*self.done.get())
        except Exception as error:
            _tell_failure(self.link, error)

    def _messages(self) -> Iterator[Message]:
        """Each when its turn comes; what it needs of other ranks is expected as soon as it is known."""
        known: deque[Message] = deque()
        while True:
            while not known or not self.inbox.empty():
                if (message := self.inbox.get()) is None:
                    return
                if message.kind == "pages":
                    self.transfer.expect(message.fields["pages"])
                elif message.kind == "step":
                    self._expect(message.fields)
                known.append(message)
            yield known.popleft()

    def _expect(self, step: dict[str, Any]) -> None:
        """What a step will need of other ranks, or bring from them."""
        tokens, samples = len(step["token_ids"]), len(step["sampled"])
        if not self.stage.shard.first:
            self.peers.expect(self.before, (tokens, self.hidden_size), torch.float32)
        if self.listens and step["head_on_first"]:
            self.peers.expect(self.layout.sampler, (samples, self.hidden_size), torch.float32)
        elif self.listens and samples:
            self.peers.expect(self.layout.sampler, (samples,), torch.int32)


class Launch(NamedTuple):
    """A step that this rank is told to compute."""

    number: int
    step: StepBatch
    head_on_first: bool  # the first stage computes what follows the last layer


def _rendezvous() -> socket.socket:
    """The engine, found as torchrun's processes find each other: by MASTER_ADDR, MASTER_PORT and RANK."""
    from torch.distributed import TCPStore

    wanted = ("MASTER_ADDR", "MASTER_PORT", "RANK")
    if missing := [name for name in wanted if name not in os.environ]:
        sys.exit(f"a rank that is started by hand needs {', '.join(wanted)} in its environment: no {missing[0]}")
    address, port, rank = (os.environ[name] for name in wanted)
    hosts = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(address, int(port), is_master=hosts, wait_for_workers=False, timeout=timedelta(hours=1))
    host, _, port = store.get(ENGINE_KEY).decode().rpartition(":")
    channel = socket.create_connection((host, int(port)), timeout=DEADLINE)
    channel.settimeout(None)
    Link(channel).send("hello", rank=int(rank))
    _kept.append(store)
    return channel


ENGINE_KEY = "batchinfer/engine"  # in the store: where the engine listens for its ranks
_kept: list[object] = []  # a store serves others for as long as it lives


if __name__ == "__main__":
    main()
