"""Pipeline: a model over several ranks, with several steps under way at once."""

from __future__ import annotations

import functools
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import batchinfer
from batchinfer import errors
from batchinfer.engine.balance import Costs, deal, keep_costs, known_costs
from batchinfer.engine.comm import Arena, SharedPeers
from batchinfer.engine.layout import Layout
from batchinfer.engine.link import Link, Message, encode
from batchinfer.engine.occupancy import Occupancy
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.scheduler import StepBatch
from batchinfer.engine.stage import Tokens
from batchinfer.engine.trace import Trace
from batchinfer.engine.worker import ARENA_FD, LINK_FD, fields_of
from batchinfer.errors import EngineError
from batchinfer.host import available_cores

DEADLINE = 300.0  # seconds without a sign of life after which ranks count as hung


class Pipeline:
    """The ranks of a layout, each a process, behind the face of one stage.

    Steps are launched one after the other and pass through the stages in that order, so that each stage works on
    another one; their tokens are taken in the same order. A rank that dies or is silent for too long ends them all.
    """

    def __init__(
        self,
        plan: EnginePlan,
        tp: int,
        pp: int,
        partition: tuple[int, ...] = (),
        *,
        kv_cache_gib: float,
        threads: int,
        micro_batches: int = 0,
        trace: Trace | None = None,
    ) -> None:
        """
        Args:
            partition: layers of each stage; none given: dealt by the time they take here.
            kv_cache_gib: memory for KV pages of each rank.
            threads: CPU threads of each rank, 0 for an even share of the cores.
            micro_batches: steps under way at once, 0 for one a stage.
            trace: gets what the ranks do.

        Raises:
            ModelError: the plan cannot be used so.
            EngineError: the ranks did not start.
        """
        threads = threads or max(1, available_cores() // (tp * pp))
        costs = known_costs(plan, tp, threads)
        if not partition and (costs or pp == 1):
            partition = deal(plan.spec.num_layers, pp, costs or Costs(1, 0, 0))
        self.layout = Layout(tp, partition or (0,) * pp)
        self.depth = micro_batches or pp
        self._arena: int | None = None
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self.occupancy = Occupancy(self.layout.size, self.depth)
        self.trace = trace
        self._launched = 0
        self._tokens: dict[int, np.ndarray] = {}  # by the number of the step, not asked for yet
        try:
            self._start(plan, kv_cache_gib, threads)
        except BaseException:
            self.close()
            raise

    def _start(self, plan: EnginePlan, kv_cache_gib: float, threads: int) -> None:
        told: dict[str, Any] = dict(
            plan=str(plan.path),
            tp=self.layout.tp,
            partition=self.layout.partition,
            threads=threads,
            kv_cache_gib=kv_cache_gib,
            deadline=DEADLINE,
        )
        arena = None
        if plan.device == "cpu":
            told["sizes"] = self._sizes(plan)
            arena = self._share_memory(told["sizes"])
        for rank in range(self.layout.size):
            self._ranks.append(_Rank.start(rank, self.layout.name(rank), arena))
            self._selector.register(self._ranks[-1].link, selectors.EVENT_READ, self._ranks[-1])
            self._ranks[-1].link.send("open", rank=rank, device=rank, **told)
        if not all(self.layout.partition):
            self._balance(plan, threads)
        pages = min(message.fields["count"] for message in self._each("pages"))
        for rank in self._ranks:
            rank.link.send("pages", count=pages)
        self.num_pages = pages
        ready = self._each("ready")
        self.page_size, self.kernels_name = ready[0].fields["page_size"], ready[0].fields["kernels"]

    def _balance(self, plan: EnginePlan, threads: int) -> None:
        """Have the ranks measure, all at once, as they will compute, and tell them which layers are theirs."""
        told = [message.fields for message in self._each("costs")]
        costs = Costs(**{name: max(rank[name] for rank in told) for name in told[0]})
        keep_costs(plan, self.layout.tp, threads, costs)
        self.layout = replace(self.layout, partition=deal(plan.spec.num_layers, len(self.layout.partition), costs))
        for rank in self._ranks:
            rank.link.send("partition", partition=self.layout.partition)

    def _sizes(self, plan: EnginePlan) -> dict[str, int]:
        """Of what ranks exchange in shared memory."""
        profile, spec = plan.profile, plan.spec
        hop = profile.step_tokens * spec.hidden_size * torch.float32.itemsize
        gathered = profile.batch_size * spec.vocab_size * plan.torch_dtype.itemsize
        return dict(slots=self.depth + 1, hop_bytes=hop, team_bytes=max(hop, gathered))

    def _share_memory(self, sizes: dict[str, int]) -> int:
        """A file without a name, for an arena. It goes with the last process that has it open."""
        need = Arena()
        SharedPeers(need, self.layout, 0, DEADLINE, **sizes)
        self._arena = os.memfd_create("batchinfer")
        os.ftruncate(self._arena, need.used + mmap.PAGESIZE)
        return self._arena

    def _each(self, kind: str) -> list[Message]:
        """One message of ``kind`` from every rank."""
        got: dict[int, Message] = {}
        while len(got) < len(self._ranks):
            for rank, message in self._hear(DEADLINE):
                if message.kind == kind:
                    got[rank.number] = message
        return [got[number] for number in sorted(got)]

    # -- steps ----------------------------------------------------------------------------------------------------

    def launch(self, step: StepBatch) -> Tokens:
        """Send a step on its way; its tokens are to be asked for, in the order of the steps.

        Raises:
            EngineError: a rank died; asking for tokens, also that one hangs.
        """
        number = self._launched
        message = encode("step", number=number, **fields_of(step))
        try:
            for rank in self._ranks:
                rank.link.send_encoded(message)
        except OSError:
            raise self._died(rank) from None
        except BaseException:  # some ranks know of the step and some do not
            self.close()
            raise
        self._launched += 1
        self.occupancy.launched(step.num_tokens, len(step.sampled), time.perf_counter())
        return functools.partial(self._take, number)

    def _take(self, number: int) -> np.ndarray:
        while number not in self._tokens:
            for rank, message in self._hear(DEADLINE):
                self._note(rank, message)
        tokens = self._tokens[number]
        self._tokens = {later: tokens for later, tokens in self._tokens.items() if later > number}
        return tokens

    def _note(self, rank: _Rank, message: Message) -> None:
        told = message.fields
        self.occupancy.computed(rank.number, told["begun"], told["ended"], told["sent"])
        if self.trace is not None:
            name, about = f"step {told['step']}", {"tokens": told["count"]}
            self.trace.add(rank.number, name, told["begun"], told["ended"], **about)
        if "tokens" in told:
            self._tokens[told["step"]] = told["tokens"]
            self.occupancy.returned(time.perf_counter())

    def _hear(self, patience: float) -> list[tuple[_Rank, Message]]:
        """What ranks say next.

        Raises:
            EngineError: nobody says anything for ``patience`` seconds, or a rank died, or told why it cannot go on.
        """
        if not self._ranks:
            raise EngineError("the engine is closed: open another")
        if not (ready := self._selector.select(patience)):
            raise EngineError(f"the engine's ranks were silent for {patience:g} s; run again to go on")
        heard = []
        for key, _ in ready:
            rank: _Rank = key.data
            try:
                message = rank.link.receive()
            except EOFError:
                raise self._died(rank) from None
            if message.kind == "failed":
                raise _as_error(rank, message)
            heard.append((rank, message))
        return heard

    def _died(self, rank: _Rank) -> EngineError:
        return EngineError(f"{rank} of the engine ended: {rank.epitaph()}; run again to go on")

    def details(self) -> dict[str, Any]:
        """How busy the ranks are, for a summary."""
        return self.occupancy.details(self.layout.partition)

    def rank_names(self) -> dict[int, str]:
        return {rank: self.layout.name(rank) for rank in range(self.layout.size)}

    def close(self) -> None:
        """End the ranks, whatever they are doing."""
        self._selector.close()
        for rank in self._ranks:
            rank.end()
        self._ranks = []
        if self._arena is not None:
            os.close(self._arena)
            self._arena = None


class _Rank:
    """One rank's process and the link to it."""

    def __init__(self, number: int, name: str, process: subprocess.Popen, link: Link) -> None:
        self.number = number
        self.name = name
        self.process = process
        self.link = link

    @classmethod
    def start(cls, number: int, name: str, arena: int | None) -> _Rank:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ) | {LINK_FD: str(theirs.fileno())}
        if arena is not None:
            environment[ARENA_FD] = str(arena)
        # The same code, wherever this process found it.
        home = str(Path(batchinfer.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environment.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "batchinfer.engine.worker"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()] + ([arena] if arena is not None else []),
            env=environment,
        )
        theirs.close()
        return cls(number, name, process, Link(ours))

    def __str__(self) -> str:
        return self.name

    def epitaph(self) -> str:
        """How its process ended."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its link"
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.link.close()


def _as_error(rank: _Rank, message: Message) -> Exception:
    told = message.fields
    if told["expected"]:
        return getattr(errors, told["error"], EngineError)(told["message"])
    return EngineError(f"{rank} of the engine failed: {told['error']}: {told['message']}")
