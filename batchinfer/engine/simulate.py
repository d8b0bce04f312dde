"""Simulate: what a pipeline would do with a job, from what its stages cost. The scheduler is the real one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from batchinfer.engine.balance import FloatingHead
from batchinfer.engine.kv_cache import PagePool
from batchinfer.engine.profile import Profile
from batchinfer.engine.rows import Sequence
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.step import StepBatch
from batchinfer.request import Request


@dataclass(frozen=True)
class Simulated:
    seconds: float
    tokens: int  # prompt and completion
    steps: int
    bubble: float  # the share of all stages' time in which they had nothing to do

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Stages:
    """The stages of a pipeline, as far as time goes. All times are seconds."""

    def __init__(
        self,
        layers: Callable[[StepBatch], list[float]],
        head: Callable[[StepBatch], float] = lambda step: 0.0,
        *,
        hop: float = 0.0,
        floating: FloatingHead | None = None,
    ) -> None:
        """
        Args:
            layers: what a step takes in each stage.
            head: what it takes after the last layer.
            hop: from the end of a stage to the beginning of the next, and from the last to the engine or the first.
            floating: says whether the first stage computes the head.
        """
        self.free: list[float] = []  # of each stage, when
        self.busy = 0.0  # all of them together
        self._layers, self._head, self._hop, self._floating = layers, head, hop, floating
        self._launched = self._taken = 0
        self._heads: deque[tuple[int, float, StepBatch]] = deque()  # the first stage's, and from when it may do them
        self._known: dict[int, tuple[int, float]] = {}  # by row, which step samples it last, and when that is known
        self._done: dict[int, float] = {}  # by step, when the engine may have its tokens

    def launch(self, step: StepBatch, now: float) -> None:
        needed = step.rows[step.unknown].tolist()
        self._settle(max((self._known[row][0] for row in needed), default=-1))
        arrives, costs = max([now, *(self._known[row][1] for row in needed)]), self._layers(step)
        self.free = self.free or [0.0] * len(costs)
        for stage, cost in enumerate(costs):
            arrives = self._spend(stage, arrives, cost) + self._hop
        number, self._launched = self._launched, self._launched + 1
        if self._floating is not None and self._floating.on_first(step):
            self._heads.append((number, arrives, step))
            self._known.update(dict.fromkeys(step.sampled_rows.tolist(), (number, arrives)))
        else:
            self._is_known(number, step, self._spend(-1, arrives - self._hop, self._head(step)) + self._hop)
        self._settle(number + 1 - len(costs))  # the last stage is about to be done with it

    def take(self) -> float:
        """When the engine has the tokens of the oldest step that it has not taken."""
        number, self._taken = self._taken, self._taken + 1
        self._settle(number)
        return self._done.pop(number)

    def _settle(self, until: int) -> None:
        while self._heads and self._heads[0][0] <= until:
            number, arrives, step = self._heads.popleft()
            self._is_known(number, step, self._spend(0, arrives, self._head(step)))

    def _is_known(self, number: int, step: StepBatch, when: float) -> None:
        """To the first stage."""
        self._known.update(dict.fromkeys(step.sampled_rows.tolist(), (number, when)))
        self._done[number] = when

    def _spend(self, stage: int, arrives: float, cost: float) -> float:
        self.free[stage] = max(self.free[stage], arrives) + cost
        self.busy += cost
        return self.free[stage]


def simulate(
    requests: Iterable[Request],
    profile: Profile,
    stages: Stages,
    micro_batches: int,
    *,
    ahead: int = 0,
    page_size: int = 16,
    num_pages: int = 0,
    engine_seconds: float = 0.0,
) -> Simulated:
    """Play a job of completions that end by their length.

    Args:
        micro_batches: steps under way at once.
        ahead: as many more, which begin with tokens that the last stage tells the first, not the engine.
        num_pages: for keys and values, 0 for as many as the profile could need.
        engine_seconds: what the engine takes to compose a step and to take in its tokens.
    """
    pages = PagePool(num_pages or profile.batch_size * -(-profile.seq_len // page_size))
    scheduler = Scheduler([profile], pages, page_size, (), True, micro_batches, ahead)
    source = iter(requests)
    under_way: deque[StepBatch] = deque()
    now, tokens, steps, pulled = 0.0, 0, 0, True
    while True:
        while pulled and scheduler.num_running + len(scheduler.waiting) < profile.batch_size:
            if pulled := next(source, None):
                sequence = _sequence(pulled, profile)
                tokens += sequence.limit
                scheduler.add(sequence)
        while (step := scheduler.schedule()) is not None:
            now += engine_seconds
            steps += 1
            stages.launch(step, now)
            under_way.append(step)
        if not under_way:
            return Simulated(now, tokens, steps, 1 - stages.busy / (now * len(stages.free)))
        step = under_way.popleft()
        now = max(now, stages.take())
        scheduler.complete(step, np.zeros(len(step.sampled), np.int32))


def _sequence(request: Request, profile: Profile) -> Sequence:
    prompt = np.asarray(request.prompt_token_ids, np.int32)
    limit = min(len(prompt) + request.sampling.max_tokens, profile.seq_len)
    return Sequence(None, prompt, len(prompt), limit, request.sampling)
