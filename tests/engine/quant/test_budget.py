"""What quantising may cost: where it costs more, the matrices that cost most stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from batchinfer import Engine, SamplingParams
from batchinfer.engine.build import build
from batchinfer.engine.kernels.linear import form_of
from batchinfer.engine.model.source import ModelSource
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.model.weights import convert
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.quant import LINEARS, Quantizer, find_scheme
from batchinfer.engine.quant.budget import costliest, within
from batchinfer.engine.quant.default import default_rows
from batchinfer.engine.quant.sensitivity import ROW_TOKENS, Cost, tried
from batchinfer.engine.text import Text
from batchinfer.errors import ModelError
from tests.engine.tiny import DEVICES, make_model
from tests.engine.train import TRAINED

OPTIONS = dict(device="cpu", dtype="bfloat16", seq_len=256, quantization="int4", group_size=-1)


@pytest.fixture(scope="module")
def rows():
    return default_rows(Text(TRAINED), 2048)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, rows) -> EnginePlan:
    """All of it in 4 bits, whatever that costs."""
    folder = tmp_path_factory.mktemp("whole") / "engine"
    return build(str(TRAINED), folder, max_quality_loss=9.0, calibration=rows, progress=False, **OPTIONS)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, rows, whole) -> EnginePlan:
    """As much of it in 4 bits as costs two thirds of that."""
    folder, most = tmp_path_factory.mktemp("mixed") / "engine", 2 / 3 * loss(whole)
    return build(str(TRAINED), folder, max_quality_loss=most, calibration=rows, progress=False, **OPTIONS)


def loss(plan: EnginePlan) -> float:
    return plan.quality["perplexity"] / plan.quality["reference_perplexity"] - 1


def test_those_that_cost_most_a_weight_are_kept_until_little_enough_is_left():
    costs = {"a": Cost(6.0, 100), "b": Cost(3.0, 10), "c": Cost(1.0, 100), "d": Cost(0.0, 500)}
    assert costliest(costs, 1.0) == ()
    assert costliest(costs, 0.9) == ("b",)
    assert costliest(costs, 0.1) == ("a", "b")
    assert costliest(costs, 0.0) == ("a", "b", "c")


def test_no_more_than_half_of_the_weights_are_kept_but_so_many_are():
    costs = {name: Cost(1.0 + 0.1 * place, 10) for place, name in enumerate("abcdefg")}
    assert costliest(costs, 0.0) == ("e", "f", "g")


def test_one_that_is_nearly_all_of_the_cost_is_not_tried_twice():
    """What is left, and not what was aimed at, says how much more is to be kept."""
    costs = {"a": Cost(0.9, 1)} | {name: Cost(0.02, 1) for name in "bcdef"}
    losses, tried = iter([0.1, 0.04, 0.02]), []

    def quantised(kept=(), trying=False):
        made = SimpleNamespace(scheme="int4", kept=kept, costs=costs)
        if not trying:
            tried.append(kept)
            made.quality = SimpleNamespace(loss=next(losses))
        return made

    assert within(0.03, quantised).quality.loss == 0.02
    assert tried[:2] == [(), ("a",)] and len(tried[2]) > 1


def test_a_build_keeps_matrices_until_it_is_within_its_budget(whole, mixed):
    assert whole.kept == () and loss(whole) > 0.01
    assert 0 < len(mixed.kept) < 10 and loss(mixed) <= 2 / 3 * loss(whole)
    for layer in range(4):
        name = f"layer-{layer:03d}"
        stored = mixed.weights(name)
        forms = {linear: "weight" if f"{name}.{linear}" in mixed.kept else "int4" for linear in LINEARS}
        assert {linear: form_of(stored, linear) for linear in LINEARS} == forms


def test_both_forms_of_a_matrix_are_timed_told_and_run(mixed):
    linear = mixed.kept[0].partition(".")[2]
    timed = {tactic.operation for tactic in mixed.tactics}
    assert {f"{linear}.weight", f"{linear}.int4"} <= timed
    told = mixed.explain()
    assert f"{linear} in bfloat16 in layers " in told and f"\n{linear}.int4 " in told
    [done] = Engine(mixed).generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(done.outputs[0].token_ids) == 4


def test_matrices_are_tried_on_what_rows_do_not_have_in_common():
    system = list(range(500))
    rows = [[*system, *(1000 * row + place for place in range(80 + row))] for row in range(9)]
    assert tried(rows) == [rows[row][500 : 500 + ROW_TOKENS] for row in (0, 2, 4, 6)]
    assert tried([row[500:] for row in rows])[0] == rows[0][500 : 500 + ROW_TOKENS]
    assert tried([system, [*system, 7]]) == [system[-ROW_TOKENS:], [*system[1 - ROW_TOKENS :], 7]]


def test_a_plan_keeps_which_matrices_it_kept(mixed):
    assert json.loads((mixed.path / "plan.json").read_text())["kept"] == list(mixed.kept)
    assert EnginePlan.load(mixed.path) == mixed


def test_a_build_that_keeping_half_does_not_mend_is_refused(tmp_path, rows, whole, capsys):
    with pytest.raises(ModelError, match="quantising to int4, .* of 16 matrices in bfloat16 loses too much"):
        build(str(TRAINED), tmp_path / "engine", max_quality_loss=0.05 * loss(whole), calibration=rows, **OPTIONS)
    assert "int4: perplexity" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_what_costs_most_is_found(tmp_path, device):
    """The sixteen levels are enough for all matrices but one, in the middle of a model."""
    source = ModelSource.resolve(str(make_model(tmp_path / "model", "llama")))
    spec = DecoderSpec.from_config(source.config())

    def groups() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, group in convert(source, spec, torch.float32):
            for linear in LINEARS if name.startswith("layer") else ():
                weight = group[f"{linear}.weight"]
                if (name, linear) != ("layer-001", "down"):
                    group[f"{linear}.weight"] = torch.where(weight > 0, 0.32, -0.28)
            yield name, group

    prompts = [[(7 * i * j + j) % 256 for j in range(40)] for i in range(1, 13)]
    quantizer = Quantizer(find_scheme("int4"), -1, spec, torch.float32, torch.device(device), prompts, trying=True)
    assert [name for name, _ in quantizer(groups())] == ["embed", "layer-000", "layer-001", "layer-002", "head"]
    costs = {name: cost.divergence for name, cost in quantizer.costs.items()}
    assert len(costs) == 12 and max(costs, key=costs.get) == "layer-001.down"
    assert costs.pop("layer-001.down") > 100 * max(costs.values())
