"""Pipeline: a model over several ranks, with several steps under way at once."""

from __future__ import annotations

import functools
import mmap
import os
import selectors
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore

from batchinfer.engine.balance import Costs, FloatingHead, deal, keep_costs, known_costs
from batchinfer.engine.comm import Arena, SharedPeers, Sizes
from batchinfer.engine.kernels.cpu.library import library
from batchinfer.engine.layout import Layout, World
from batchinfer.engine.link import DEADLINE, Message, encode
from batchinfer.engine.occupancy import Occupancy
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.rank import Rank, connect_store, elsewhere
from batchinfer.engine.scheduler import AHEAD
from batchinfer.engine.stage import Tokens
from batchinfer.engine.step import StepBatch
from batchinfer.engine.trace import Trace
from batchinfer.engine.transfer import PIECE_BYTES, pages_of
from batchinfer.errors import EngineError
from batchinfer.host import available_cores

_OPENING = 6 * DEADLINE  # what reading the weights may take
_LARGE_PAGE = 256  # tokens


class Pipeline:
    """All ranks, each a process, behind the face of one stage.

    Steps are launched one after the other and pass through the stages in that order, so that each stage works on
    another one; their tokens are taken in the same order. The last stage tells the first directly which they are, so
    that a step more may be launched before the engine knows; or it leaves it to the first to choose them, where that
    has less to do. With ranks that compute prompts apart from those that decode, a step goes to either, and each kind
    ends in its own order. A rank that dies or is silent for too long ends them all.
    """

    def __init__(
        self,
        plan: EnginePlan,
        tp: int,
        pp: int,
        partition: tuple[int, ...] = (),
        prefill: tuple[int, int] | None = None,
        *,
        kv_cache_gib: float,
        threads: int,
        micro_batches: int = 0,
        trace: Trace | None = None,
    ) -> None:
        """
        Args:
            partition: layers of each stage; none given: dealt by the time they take here.
            prefill: tp and pp of ranks that compute prompts, so that all others only decode.
            kv_cache_gib: memory for KV pages of each rank.
            threads: CPU threads of each rank, 0 for an even share of the cores.
            micro_batches: steps under way at once, 0 for one a stage.
            trace: gets what the ranks do.

        Raises:
            ModelError: the plan cannot be used so.
            EngineError: the ranks did not start.
        """
        size = tp * pp + (prefill[0] * prefill[1] if prefill else 0)
        threads = threads or max(1, available_cores() // size)
        costs, layers = known_costs(plan, tp, threads), plan.spec.num_layers
        self._keep_costs = functools.partial(keep_costs, plan, tp, threads)
        self._costs = costs or Costs.of_weights(plan.spec)
        # On GPUs heads are recorded with the layers before them, and links are slow beside a head.
        floats = tp == 1 < pp and plan.device == "cpu"
        if not partition and (costs or pp == 1 or prefill):
            partition = deal(layers, pp, self._costs, floats)
        layout = Layout(tp, partition or (0,) * pp, size - tp * pp, "decode" if prefill else "", floats)
        self.world = World((layout,))
        self.ahead = AHEAD
        self.micro_batches = micro_batches or pp
        self.depth = self.micro_batches + AHEAD
        self.prefill_steps = 0
        if prefill:
            before = Layout(prefill[0], deal(layers, prefill[1], self._costs), 0, "prefill")
            self.world = World((before, layout))
            self.prefill_steps = prefill[1] + 1
        self._arena: int | None = None
        self._ranks: list[Rank] = []
        self._selector = selectors.DefaultSelector()
        self.occupancy = Occupancy(self.world.size, self.depth + self.prefill_steps)
        self.trace = trace
        self._launched = 0
        self._floating: FloatingHead | None = None
        self._heads: deque[tuple[int, bool]] = deque()  # of steps that decode: which, and whether the first stage's
        self._tokens: dict[Layout, dict[int, np.ndarray]] = {}  # by the number of the launch, not asked for yet
        try:
            self._start(plan, kv_cache_gib, threads)
        except BaseException:
            self.close()
            raise

    @property
    def layout(self) -> Layout:
        """Of the ranks that decode."""
        return self.world.layouts[-1]

    def _start(self, plan: EnginePlan, kv_cache_gib: float, threads: int) -> None:
        told: dict[str, Any] = dict(
            plan=str(plan.path),
            layouts=[astuple(part) for part in self.world.layouts],
            threads=threads,
            kv_cache_gib=kv_cache_gib,
            deadline=DEADLINE,
            depth=self.depth,
            together=not elsewhere(),
        )
        if elsewhere():
            store = self._store = connect_store()
            self._ranks = Rank.await_all(self.world, store)
            told["store"] = (store.host, store.port, f"batchinfer/{os.getpid()}/{time.time_ns()}")
        else:
            arena = None
            if plan.device == "cpu" and library() is not None:
                sizes = self._sizes(plan)
                told["sizes"], arena = asdict(sizes), self._share_memory(plan, sizes)
            else:
                store = self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                told["store"] = (store.host, store.port, "batchinfer")
            self._ranks += (Rank.start(r, self.world.layout(r).name(r), arena) for r in range(self.world.size))
        for rank in self._ranks:
            self._selector.register(rank.link, selectors.EVENT_READ, rank)
            rank.link.send("open", rank=rank.number, **told)
        if not all(self.layout.partition):
            self._balance(plan.spec.num_layers)
        pages = min(message.fields["count"] for message in self._each("pages"))
        for rank in self._ranks:
            rank.link.send("pages", count=pages)
        self.num_pages = pages
        if self.layout.head_floats:
            self._floating = FloatingHead(self.layout.partition, self._costs)
        ready = self._each("ready")
        self.page_size, self.kernels_name = ready[0].fields["page_size"], ready[0].fields["kernels"]

    def _balance(self, layers: int) -> None:
        """Have the ranks measure, all at once, as they will compute, and tell them which layers are theirs."""
        told = [message.fields for message in self._each("costs")]
        costs = self._costs = Costs(**{name: max(rank[name] for rank in told) for name in told[0]})
        self._keep_costs(costs)
        dealt = deal(layers, len(self.layout.partition), costs, self.layout.head_floats)
        self.world = World((replace(self.layout, partition=dealt),))
        for rank in self._ranks:
            rank.link.send("partition", partition=self.layout.partition)

    def _sizes(self, plan: EnginePlan) -> Sizes:
        limits, spec = plan.limits, plan.spec
        hop = limits.step_tokens * spec.hidden_size * torch.float32.itemsize
        gathered = limits.batch_size * spec.vocab_size * plan.torch_dtype.itemsize
        page = 4 * _LARGE_PAGE * spec.num_kv_heads * spec.head_dim * plan.torch_dtype.itemsize * spec.num_layers
        tokens = limits.batch_size * np.dtype(np.int32).itemsize * (spec.hidden_size if self.layout.head_floats else 1)
        return Sizes(self.depth + self.prefill_steps + 1, hop, tokens, max(hop, gathered), max(PIECE_BYTES, page))

    def _share_memory(self, plan: EnginePlan, sizes: Sizes) -> int:
        """A file without a name, for an arena; only what is touched takes memory. It goes with its last process."""
        need = Arena()
        transfers = [(piece.source, piece.target) for piece in self.world.pieces(plan.spec)]
        SharedPeers(need, self.world, transfers, 0, DEADLINE, sizes)
        self._arena = os.memfd_create("batchinfer")
        os.ftruncate(self._arena, need.used + mmap.PAGESIZE)
        return self._arena

    def _each(self, kind: str) -> list[Message]:
        """One message of ``kind`` from every rank."""
        got: dict[int, Message] = {}
        while len(got) < len(self._ranks):
            for rank, message in self._hear(_OPENING):
                if message.kind == kind:
                    got[rank.number] = message
        return [got[number] for number in sorted(got)]

    # -- steps ----------------------------------------------------------------------------------------------------

    def launch(self, step: StepBatch) -> Tokens:
        """Send a step on its way; its tokens are to be asked for, in the order of the steps.

        Raises:
            EngineError: a rank died; asking for tokens, also that one hangs.
        """
        if len(self.world.layouts) > 1 and not step.extends.all():
            return _Awaited(self, self.world.layouts[0], self._send(self.world.layouts[0], step, head_on_first=False))
        on_first = self._floating is not None and self._floating.on_first(step)
        number = self._send(self.layout, step, on_first)
        self._heads.append((number, on_first))
        if len(self._heads) >= len(self.layout.partition):  # the last stage is about to be done with the oldest
            self._order_heads(self._heads[0][0])
        return _Awaited(self, self.layout, number)

    def _order_heads(self, until: int) -> None:
        """Tell the first stage to compute its heads of steps up to this one."""
        while self._heads and self._heads[0][0] <= until:
            number, on_first = self._heads.popleft()
            if on_first:
                self._tell({self.layout.ranks[:1]: encode("head", number=number)})

    def next_done(self, launched: Sequence[Tokens]) -> int:
        """Which of the steps under way, oldest first, to ask for its tokens: prompts are long, others go on.

        It is the oldest of its kind: two stages may tell of their heads in another order.
        """
        if len(self.world.layouts) == 1:
            return 0
        oldest = {awaited.layout: place for place, awaited in reversed([*enumerate(launched)])}
        if self.layout in oldest:
            self._order_heads(launched[oldest[self.layout]].number)
        while True:
            for layout, place in oldest.items():
                if launched[place].number in self._tokens.get(layout, {}):
                    return place
            self._listen(DEADLINE)

    def _send(self, layout: Layout, step: StepBatch, head_on_first: bool) -> int:
        """The number by which its tokens are to be asked for; no other step ever has it, whatever comes between."""
        number, self._launched = self._launched, self._launched + 1
        told = {layout.ranks: encode("step", number=number, head_on_first=head_on_first, **step.fields())}
        if layout is not self.layout:
            told[self.layout.ranks] = encode("pages", number=number, pages=pages_of(step, self.page_size))
        self._tell(told)
        self.occupancy.launched(step.num_tokens, len(step.sampled), time.perf_counter())
        return number

    def _tell(self, told: Mapping[range, bytes]) -> None:
        """Messages to ranks: to all of them, or this is the end."""
        if not self._ranks:
            raise EngineError("the engine is closed: open another")
        try:
            for ranks, message in told.items():
                for number in ranks:
                    self._ranks[number].link.send_encoded(message)
        except OSError:
            raise self._ranks[number].died() from None
        except BaseException:  # some ranks know of the step and some do not
            self.close()
            raise

    def take(self, layout: Layout, number: int) -> np.ndarray:
        """The tokens of a step that was sent to a layout's ranks; none before it are asked for any more."""
        if layout is self.layout:
            self._order_heads(number)
        while number not in self._tokens.get(layout, {}):
            self._listen(DEADLINE)
        tokens = self._tokens[layout][number]
        self._tokens[layout] = {later: each for later, each in self._tokens[layout].items() if later > number}
        if layout is not self.layout:
            self._tell({self.layout.ranks: encode("take", number=number)})
        return tokens

    def _listen(self, patience: float) -> None:
        for rank, message in self._hear(patience):
            self._note(rank, message)

    def _note(self, rank: Rank, message: Message) -> None:
        told = message.fields
        if message.kind == "moved":
            self.occupancy.moved(rank.number, told["begun"], told["ended"])
            if self.trace is not None:
                self.trace.add(rank.number, "keys and values", told["begun"], told["ended"], pages=told["pages"])
            return
        if message.kind == "done":
            name, about = "step", {"tokens": told["count"]}
            self.occupancy.computed(rank.number, told["begun"], told["ended"], told["sent"])
        else:
            name, about = "head", {"samples": told["samples"]}
            self.occupancy.headed(rank.number, told["begun"], told["ended"], told["sent"])
        if self.trace is not None:
            self.trace.add(rank.number, f"{name} {told['step']}", told["begun"], told["ended"], **about)
        if "tokens" in told:
            self._tokens.setdefault(self.world.layout(rank.number), {})[told["step"]] = told["tokens"]
            self.occupancy.returned(time.perf_counter())

    def _hear(self, patience: float) -> list[tuple[Rank, Message]]:
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
            rank: Rank = key.data
            try:
                message = rank.link.receive()
            except EOFError:
                raise rank.died() from None
            if message.kind == "failed":
                raise rank.failed(message)
            heard.append((rank, message))
        return heard

    def forget(self) -> None:
        """Begin to count anew."""
        self.occupancy = self.occupancy.anew()

    def details(self) -> dict[str, Any]:
        """How busy the ranks are, for a summary."""
        names = [str(rank) for rank in self._ranks]
        return {"tp": self.layout.tp, "partition": self.layout.partition, **self.occupancy.details(names)}

    def rank_names(self) -> dict[int, str]:
        return {rank.number: str(rank) for rank in self._ranks}

    def close(self) -> None:
        """End the ranks, whatever they are doing. What their steps took tells how to deal layers next time."""
        if len(self.world.layouts) == 1 and (costs := Costs.of_run(self.layout, self.occupancy)) is not None:
            self._keep_costs(costs)
        self._selector.close()
        for rank in self._ranks:
            rank.end()
        self._ranks = []
        if self._arena is not None:
            os.close(self._arena)
            self._arena = None


@dataclass(frozen=True, slots=True)
class _Awaited:
    """The tokens of a step under way."""

    pipeline: Pipeline
    layout: Layout
    number: int

    def __call__(self) -> np.ndarray:
        return self.pipeline.take(self.layout, self.number)
