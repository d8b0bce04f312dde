"""The simulator plays the real scheduler's steps against what stages cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchinfer.bench import workload
from batchinfer.bench_pipeline import StepCosts
from batchinfer.engine.balance import Costs, FloatingHead
from batchinfer.engine.profile import Profile
from batchinfer.engine.simulate import Stages, simulate
from batchinfer.engine.trace import Span
from batchinfer.request import Request, SamplingParams

JOBS = workload(24)
TOKENS = sum(len(job.prompt_token_ids) + job.sampling.max_tokens for job in JOBS)
PROFILE = Profile(16, 128, 1024)


def played(stages: int, micro_batches: int, hop: float = 0.0, **overheads):
    return simulate(JOBS, PROFILE, Stages(lambda step: [1.0] * stages, hop=hop), micro_batches, **overheads)


def test_one_stage_is_always_busy():
    told = played(1, 1)
    assert (told.tokens, told.bubble) == (TOKENS, 0.0)
    assert told.seconds == told.steps


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_with_one_micro_batch_all_stages_but_one_wait(stages):
    assert played(stages, 1).bubble == pytest.approx(1 - 1 / stages)


def test_with_a_micro_batch_a_stage_only_the_ends_are_idle():
    alike = [Request(i, [1] * 20, SamplingParams(max_tokens=40, ignore_eos=True)) for i in range(64)]
    told = simulate(alike, Profile(64, 128, 1024), Stages(lambda step: [1.0] * 4), 4)
    assert 0 < told.bubble < 0.05


def test_the_slowest_stage_sets_the_pace():
    told = simulate(JOBS, PROFILE, Stages(lambda step: [1.0, 3.0]), 2)
    assert told.seconds == pytest.approx(3 * told.steps, rel=0.1)
    assert told.bubble == pytest.approx(1 / 3, abs=0.05)


def test_a_head_that_floats_leaves_no_stage_idle():
    """Layers dealt evenly, and a head as long as a third of them: with the last stage the first waits for it."""

    def told(floating: FloatingHead | None):
        stages = Stages(lambda step: [3.0, 3.0], lambda step: 1.0 * (len(step.sampled) > 0), floating=floating)
        return simulate(JOBS, PROFILE, stages, 2, ahead=1)

    at_last, floats = told(None), told(FloatingHead((1, 1), Costs(1, 0, 1)))
    assert at_last.bubble > 0.1 > floats.bubble
    assert floats.seconds < 0.92 * at_last.seconds


def test_hops_and_the_engine_take_their_time():
    assert played(2, 1, hop=0.5).seconds == 3 * played(2, 1).steps
    assert played(1, 1, engine_seconds=0.5).seconds == 1.5 * played(1, 1).steps


def test_costs_are_found_again_in_what_ranks_took():
    costs = StepCosts(2e-4, 3e-6, 5e-4, 4e-5)
    partition = (17, 13)
    spans = []
    for tokens, samples in [(10, 10), (60, 20), (200, 30), (64, 64), (128, 0)]:
        layer = costs.layer + costs.layer_token * tokens
        spans += [Span(rank, "step", 1.0, 1.0 + partition[rank] * layer, {"tokens": tokens}) for rank in (0, 1)]
        head = costs.head + costs.head_sample * samples if samples else 0
        spans += [Span(samples % 2, "head", 1.0, 1.0 + head, {"samples": samples})]
    found = StepCosts.fit(partition, spans)
    assert (found.layer, found.layer_token) == (pytest.approx(costs.layer), pytest.approx(costs.layer_token))
    assert (found.head, found.head_sample) == (pytest.approx(costs.head), pytest.approx(costs.head_sample))
    assert found.jitter == pytest.approx([1.0] * len(found.jitter))


def test_jitter_is_what_steps_alike_differ_by_and_makes_stages_wait():
    taken = 8 * [1.0, 1.0, 1.0, 1.25]
    spans = [Span(rank, "step", 0.0, seconds * 64, {"tokens": 64}) for rank in (0, 1) for seconds in taken]
    costs = StepCosts.fit((1, 1), spans)
    assert sorted(costs.jitter) == pytest.approx([seconds / 1.0625 for seconds in sorted(2 * taken)])

    def bubble(costs: StepCosts) -> float:
        return simulate(JOBS, PROFILE, costs.stages((1, 1), 0.0), 2, ahead=1).bubble

    assert bubble(costs) > bubble(replace(costs, jitter=())) + 0.02
