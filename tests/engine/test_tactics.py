"""Tactics: contenders are timed once, the fastest is told, and the engine goes by it."""

from __future__ import annotations

import json

import pytest
import torch

from batchinfer import Engine, SamplingParams
from batchinfer.engine import tactics
from batchinfer.engine.build import build
from batchinfer.engine.kernels import activation
from batchinfer.engine.kernels.cpu.library import library
from batchinfer.engine.kernels.linear.dense import Linear
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.tactics import Tactic
from tests.engine.tiny import make_model

OPERATIONS = [
    *("add_rms_norm", "qkv.weight", "attention", "o.weight", "gate_up.weight", "silu_mul", "down.weight"),
    *("head.weight", "sample"),
]
OPTIONS = dict(device="cpu", dtype="bfloat16", batch_size=16, step_tokens=48, seq_len=64, progress=False)
own = pytest.mark.skipif(library() is None, reason="without kernels of our own there is nothing to choose")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture
def plan(model, tmp_path) -> EnginePlan:
    return build(model, tmp_path / "plan", **OPTIONS)


def tactic(**times) -> Tactic:
    return Tactic("qkv", "", (8, 64), times)


def test_the_winner_takes_least_over_all_shapes_and_the_first_unless_another_is_clearly_faster():
    assert tactic(own=(4.0, 9.0), torch=(10.0, 2.8)).winner == "torch"
    assert tactic(own=(4.0, 9.0), torch=(10.0, 4.0)).winner == "own"
    assert tactic(own=(1.0, 1.0), torch=(0.99, 0.99)).winner == "own"
    assert tactic(own=(1.0, 1.0), torch=(0.89, 0.89)).winner == "torch"


def test_a_build_tells_what_it_timed_at_the_shapes_of_its_profile(plan):
    assert [tactic.operation for tactic in plan.tactics] == OPERATIONS
    assert {tactic.tokens for tactic in plan.tactics} == {(16, 48), (16,)}
    assert all(min(times) > 0 for tactic in plan.tactics for times in tactic.microseconds.values())
    told = json.loads((plan.path / "plan.json").read_text())["tactics"]
    assert [entry["winner"] for entry in told] == [tactic.winner for tactic in plan.tactics]


@own
def test_a_table_shows_winners_before_runners_up(plan):
    lines = plan.explain().partition("operation")[2].splitlines()[1:]
    assert len(lines) == sum(len(tactic.microseconds) for tactic in plan.tactics) > len(OPERATIONS)
    [at] = [i for i, line in enumerate(lines) if line.startswith("silu_mul [80]")]
    winner = next(tactic.winner for tactic in plan.tactics if tactic.operation == "silu_mul")
    assert f"  {winner}  " in lines[at] and f"  {winner}  " not in lines[at + 1]


def test_a_second_build_times_nothing_and_comes_to_the_same(model, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(tactics, "best_seconds", lambda *_: pytest.fail("timed again"))
    again = build(model, tmp_path / "again", **OPTIONS)
    assert again.tactics == plan.tactics and again.digest == plan.digest


def test_other_shapes_are_timed_anew(model, plan, tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(tactics, "best_seconds", lambda *_: timed.append(1) or 1.0)
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    build(model, tmp_path / "again", **OPTIONS | {"batch_size": 17})
    assert timed


@own
def test_the_engine_goes_by_the_winners(plan):
    def engine_where(winner: str) -> Engine:
        file = plan.path / "plan.json"
        value = json.loads(file.read_text())
        for tactic in value["tactics"]:
            for name, times in tactic["microseconds"].items():
                tactic["microseconds"][name] = [1.0 if name == winner else 9.0] * len(times)
        file.write_text(json.dumps(value))
        return Engine(plan.path)

    by_torch, by_own = engine_where("torch"), engine_where("own")
    assert by_torch.stage.kernels.silu_mul is activation.silu_mul is not by_own.stage.kernels.silu_mul
    assert type(by_torch.stage.decoder.layers[0].qkv) is Linear is type(by_torch.stage.decoder.head)
    assert type(by_own.stage.decoder.layers[0].qkv) is not Linear
    sampling = SamplingParams(max_tokens=1)
    logits = [engine.stage.decoder.head(torch.ones(1, 48).bfloat16()).float() for engine in (by_torch, by_own)]
    torch.testing.assert_close(*logits, rtol=0.02, atol=0.02)
    for engine in (by_torch, by_own):
        assert all(done.error is None for done in engine.generate([[1, 2, 3]] * 20, sampling))


def test_a_winner_that_does_not_work_here_gives_way(plan):
    file = plan.path / "plan.json"
    file.write_text(file.read_text().replace('"own": [', '"elsewhere": [').replace('"torch": [', '"nowhere": ['))
    assert len(list(Engine(plan.path).generate([[1, 2]], SamplingParams(max_tokens=2)))) == 1
