"""Simulate: what a pipeline would do with a job, from what its stages cost. The scheduler is the real one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from batchinfer.engine.kv_cache import PagePool
from batchinfer.engine.profile import Profile
from batchinfer.engine.scheduler import Scheduler, Sequence, StepBatch
from batchinfer.request import Request

StageSeconds = Callable[[StepBatch], list[float]]  # what each stage takes for a step


@dataclass(frozen=True)
class Simulated:
    seconds: float
    tokens: int  # prompt and completion
    steps: int
    bubble: float  # the share of all stages' time in which they had nothing to do

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def simulate(
    requests: Iterable[Request],
    profile: Profile,
    stage_seconds: StageSeconds,
    micro_batches: int,
    *,
    ahead: int = 0,
    page_size: int = 16,
    num_pages: int = 0,
    engine_seconds: float = 0.0,
    hop_seconds: float = 0.0,
) -> Simulated:
    """Play a job of completions that end by their length.

    Args:
        micro_batches: steps under way at once.
        ahead: as many more, which begin with tokens that the last stage tells the first, not the engine.
        num_pages: for keys and values, 0 for as many as the profile could need.
        engine_seconds: what the engine takes to compose a step and to take in its tokens.
        hop_seconds: from the end of a stage to the beginning of the next, and from the last to the engine or the first.
    """
    pages = PagePool(num_pages or profile.batch_size * -(-profile.seq_len // page_size))
    scheduler = Scheduler([profile], pages, page_size, (), True, micro_batches, ahead)
    source = iter(requests)
    under_way: deque[tuple[StepBatch, float]] = deque()
    now, tokens, steps, pulled = 0.0, 0, 0, True
    free: list[float] = []
    known = np.zeros(profile.batch_size)  # by row, when the token sampled last is there
    busy = 0.0
    while True:
        while pulled and scheduler.num_running + len(scheduler.waiting) < profile.batch_size:
            if pulled := next(source, None):
                sequence = _sequence(pulled, profile)
                tokens += sequence.limit
                scheduler.add(sequence)
        while len(under_way) < micro_batches + ahead and (step := scheduler.schedule()) is not None:
            now += engine_seconds
            steps += 1
            arrives, costs = max(now, known[step.rows[step.unknown]].max(initial=0)), stage_seconds(step)
            free = free or [0.0] * len(costs)
            for stage, cost in enumerate(costs):
                free[stage] = max(free[stage], arrives) + cost
                arrives = free[stage] + hop_seconds
                busy += cost
            known[step.sampled_rows] = arrives
            under_way.append((step, arrives))
        if not under_way:
            return Simulated(now, tokens, steps, 1 - busy / (now * len(free)))
        step, done = under_way.popleft()
        now = max(now, done)
        scheduler.complete(step, np.zeros(len(step.sampled), np.int32))


def _sequence(request: Request, profile: Profile) -> Sequence:
    prompt = np.asarray(request.prompt_token_ids, np.int32)
    limit = min(len(prompt) + request.sampling.max_tokens, profile.seq_len)
    return Sequence(None, prompt, len(prompt), limit, request.sampling)
