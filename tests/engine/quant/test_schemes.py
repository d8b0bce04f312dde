"""Schemes: each loses less than the one it improves on, and what is built runs."""

from __future__ import annotations

import pytest
import torch

from batchinfer import Engine, SamplingParams
from batchinfer.engine.build import build
from batchinfer.engine.kernels.linear.int4 import dequantize
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.quant import SCHEMES, awq, fp8, gptq, int4, smoothquant
from batchinfer.engine.quant.calibration import Inputs
from batchinfer.engine.quant.quality import _is_new, _standard_error
from batchinfer.errors import ModelError
from tests.engine.tiny import DEVICES, make_model

ROWS = [[(7 * i * j + j) % 256 for j in range(40)] for i in range(1, 13)]
TINY = DecoderSpec("llama", 320, 64, 96, 1, 4, 2, 16, 1e-5, 128, True)


@pytest.fixture
def weight_and_inputs():
    """Inputs as models have them: correlated, and some channels far larger than others."""
    torch.manual_seed(3)
    mixed = torch.randn(2000, 24) @ torch.randn(24, 128) + 0.3 * torch.randn(2000, 128)
    mixed[:, ::17] *= 12
    return torch.randn(96, 128) * 0.05, Inputs([mixed])


def output_error(weight: torch.Tensor, made: torch.Tensor, inputs: Inputs) -> float:
    error = made - weight
    return float((error @ inputs.hessian * error).sum())


def weight_of(made: dict[str, torch.Tensor]) -> torch.Tensor:
    return dequantize(made["int4"], made["scale"], made["zero"], int(made["group"]))


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_loses_far_less_than_rounding_on_the_same_grid(weight_and_inputs, act_order):
    weight, inputs = weight_and_inputs
    rounded = int4.quantize(weight, 32)
    made = gptq.quantize(weight, inputs.hessian, 32, act_order=act_order)
    assert torch.equal(made["scale"], rounded["scale"])
    assert output_error(weight, weight_of(made), inputs) < 0.5 * output_error(weight, weight_of(rounded), inputs)


def test_fp8_that_has_seen_inputs_loses_far_less_than_rounding(weight_and_inputs):
    weight, inputs = weight_and_inputs
    made, rounded = fp8.quantize(weight, inputs.hessian), fp8.quantize(weight)
    assert torch.equal(made["scale"], rounded["scale"])
    losses = [output_error(weight, one["fp8"].float() * one["scale"][:, None], inputs) for one in (made, rounded)]
    assert losses[0] < 0.5 * losses[1]


def test_what_makes_up_for_rounding_is_rounding_where_inputs_do_not_correlate(weight_and_inputs):
    weight, _ = weight_and_inputs
    assert torch.equal(gptq.quantize(weight, torch.eye(128), 32)["int4"], int4.quantize(weight, 32)["int4"])
    assert torch.equal(fp8.quantize(weight, torch.eye(128))["fp8"].float(), fp8.quantize(weight)["fp8"].float())


def test_gptq_does_without_what_calibration_never_saw(weight_and_inputs):
    weight, inputs = weight_and_inputs
    x = inputs.chunks[0].clone()
    x[:, 5] = 0
    x[:, 6] = x[:, 7]  # and a Hessian that no Cholesky takes as it is
    made = weight_of(gptq.quantize(weight, Inputs([x]).hessian, 32))
    assert made.isfinite().all()
    assert torch.equal(made[:, 5], weight_of(int4.quantize(weight, 32))[:, 5]), "that column is rounded by itself"
    x[0, 0] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        gptq.quantize(weight, Inputs([x]).hessian, 32)


def test_the_size_of_a_hessian_decides_nothing_nor_do_inputs_that_it_has_not_seen(weight_and_inputs):
    weight, inputs = weight_and_inputs
    x = inputs.chunks[0] * 1e-3
    x[:, 40:] = 0
    made = [weight_of(gptq.quantize(weight, scale * Inputs([x]).hessian, 32)) for scale in (1.0, 1e6)]
    assert torch.equal(*made)
    alone = gptq.compensated(weight[:, :40], Inputs([x[:, :40]]).hessian, nearest := lambda column, _: column.round())
    assert torch.equal(gptq.compensated(weight, Inputs([x]).hessian, nearest)[:, :40], alone)


def test_columns_too_many_to_make_up_for_each_other_all_do_so_in_parts(weight_and_inputs, monkeypatch):
    weight, inputs = weight_and_inputs
    whole, plain = fp8.quantize(weight, inputs.hessian), fp8.quantize(weight)
    monkeypatch.setattr(gptq, "MOST_INPUTS", 50)
    parts = fp8.quantize(weight, inputs.hessian)
    first = gptq.compensated(weight[:, :43], inputs.hessian[:43, :43], lambda column, _: column.round())
    assert torch.equal(gptq.compensated(weight, inputs.hessian, lambda column, _: column.round())[:, :43], first)
    losses = [output_error(weight, one["fp8"].float() * one["scale"][:, None], inputs) for one in (whole, parts, plain)]
    assert losses[0] < losses[1] < 0.9 * losses[2]


def test_awq_loses_less_than_rounding(weight_and_inputs):
    weight, inputs = weight_and_inputs
    scale = awq.search_scale(weight, inputs, inputs.mean, 32)
    scaled, hessian = weight * scale, inputs.hessian / scale / scale[:, None]
    clipped = int4.Grid.over(scaled, 32, awq.search_shrink(scaled, hessian, 32)).rounded(scaled, 32) / scale
    plain = int4.Grid.over(scaled, 32).rounded(scaled, 32) / scale
    rounded = weight_of(int4.quantize(weight, 32))
    losses = [output_error(weight, made, inputs) for made in (clipped, plain, rounded)]
    assert losses[0] < losses[1] < 0.7 * losses[2]


def test_smoothquant_loses_less_than_rounding_both_sides_as_they_are(weight_and_inputs):
    weight, inputs = weight_and_inputs
    x = inputs.sample(512)
    scale = smoothquant.search_scale(weight, x, inputs.most, weight.abs().amax(0))

    def loss(scale: torch.Tensor) -> float:
        x_rounded, weight_rounded = (smoothquant._rounded(side) for side in (x / scale, weight * scale))
        return float((x_rounded @ weight_rounded.T - x @ weight.T).square().sum())

    assert loss(scale) < 0.6 * loss(torch.ones_like(scale))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    heads, kv = TINY.num_heads * TINY.head_dim, TINY.num_kv_heads * TINY.head_dim
    uneven = (torch.rand(heads + 2 * kv, 1) * 4) ** 2
    return {
        "attn_norm.weight": torch.rand(64) + 0.5,
        "qkv.weight": torch.randn(heads + 2 * kv, 64) * uneven,
        "qkv.bias": torch.randn(heads + 2 * kv),
        "o.weight": torch.randn(64, heads),
        "mlp_norm.weight": torch.rand(64) + 0.5,
        "gate_up.weight": torch.randn(192, 64),
        "down.weight": torch.randn(64, 96),
    }


def through(group: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the linears of a layer are fed, and what they give; attention looks at nothing but the token itself."""
    heads, kv = TINY.num_heads * TINY.head_dim, TINY.num_kv_heads * TINY.head_dim
    first, second = x * group["attn_norm.weight"], x * group["mlp_norm.weight"]
    qkv = first @ group["qkv.weight"].T + group["qkv.bias"]
    values = qkv[:, heads + kv :].view(len(x), TINY.num_kv_heads, 1, -1).expand(-1, -1, 2, -1).reshape(len(x), -1)
    gate, up = (second @ group["gate_up.weight"].T).chunk(2, dim=1)
    activated = gate.sigmoid() * up
    made = [qkv[:, : heads + kv], values @ group["o.weight"].T, gate, activated @ group["down.weight"].T]
    return [first, values, second, activated], made


@pytest.mark.parametrize("scheme", [awq, smoothquant])
def test_scales_that_a_scheme_finds_change_no_product(layer, scheme):
    x = torch.randn(200, 64) * (torch.rand(64) * 8) ** 2
    fed, before = through(layer, x)
    inputs = {linear: Inputs([one]) for linear, one in zip(("qkv", "o", "gate_up", "down"), fed, strict=True)}
    unscaled = {name: tensor.clone() for name, tensor in layer.items()}
    scheme.quantize_layer(layer, inputs, TINY, 32)
    scaled = [linear for linear in inputs if not layer[f"{linear}.weight"].equal(unscaled[f"{linear}.weight"])]
    assert {"o", "qkv"} <= set(scaled)
    for was, now in zip(before, through(layer, x)[1], strict=True):
        torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-4 * float(was.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_builds_an_engine_that_runs_and_is_measured(tmp_path, scheme, device):
    folder = make_model(tmp_path / "model", "qwen2")
    options = dict(quantization=scheme, group_size=32, max_quality_loss=1e9, calibration=ROWS, seq_len=64)
    plan = build(str(folder), tmp_path / "engine", device=device, dtype="bfloat16", progress=False, **options)
    assert plan.quantization == scheme and plan.quality["tokens"] == 3 * 39
    assert 0 < plan.quality["agreement"] <= 1
    assert 0 < plan.quality["standard_error"] < plan.quality["perplexity"] / plan.quality["reference_perplexity"]
    stored = plan.weights("layer-000")
    assert "qkv.weight" not in stored and "qkv.bias" in stored
    done = list(Engine(plan).generate(ROWS, SamplingParams(max_tokens=3, ignore_eos=True)))
    assert all(len(completion.outputs[0].token_ids) == 3 for completion in done)


def test_a_build_that_loses_too_much_is_refused_and_leaves_nothing(tmp_path):
    folder = make_model(tmp_path / "model", "llama")
    with pytest.raises(ModelError, match=r"loses too much: perplexity .*max_quality_loss is 0\.0%\. Raise it"):
        build(
            str(folder),
            tmp_path / "engine",
            quantization="int4",
            group_size=-1,
            max_quality_loss=0.0,
            calibration=ROWS,
            seq_len=64,
            progress=False,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_job_of_one_row_is_calibrated_with_a_text_that_comes_along(tmp_path, monkeypatch):
    monkeypatch.setattr("batchinfer.engine.build._CALIBRATION_TOKENS", 2048)
    folder = make_model(tmp_path / "model", "llama")
    options = dict(quantization="gptq", max_quality_loss=1e9, seq_len=64, progress=False)
    plans = [
        build(str(folder), tmp_path / f"engine-{i}", calibration=rows, **options)
        for i, rows in enumerate(([[1, 2, 3], [4], []], []))
    ]
    assert plans[0].quality == plans[1].quality and plans[0].quality["tokens"] == 2 * 255


def test_what_rows_begin_with_alike_is_measured_once():
    assert _is_new([[1, 2, 3], [1, 2, 4, 3], [2, 3], [1, 2, 4]]).tolist() == [
        *(True, True, True),
        *(False, False, True, True),
        *(True, True),
        *(False, False, False),
    ]


def test_tokens_of_a_passage_are_no_measurements_of_their_own():
    values = torch.tensor([1.0, 3.0, 2.0, 6.0])
    apart = _standard_error(values, torch.tensor([0, 1, 2, 3]))
    assert apart == pytest.approx(float(values.std()) / 2)
    assert _standard_error(values.repeat_interleave(5), torch.arange(4).repeat_interleave(5)) == pytest.approx(apart)
    assert _standard_error(values, torch.tensor([7, 7, 7, 7])) == pytest.approx(apart)


def test_what_measures_quality_calibrated_nothing(tmp_path):
    """Other held-out rows: the same engine. Other calibration rows: another."""
    folder = make_model(tmp_path / "model", "llama-tied")
    other = [[(11 * i * j + 3) % 256 for j in range(40)] for i in range(1, 13)]
    held_out = [other[i] if i % 4 == 0 else row for i, row in enumerate(ROWS)]
    options = dict(quantization="gptq", max_quality_loss=1e9, seq_len=64, progress=False)
    plans = [
        build(str(folder), tmp_path / f"engine-{i}", calibration=rows, **options)
        for i, rows in enumerate((ROWS, ROWS, held_out, other))
    ]
    tensors = [plan.fingerprint["tensors"] for plan in plans]
    assert tensors[0] == tensors[1] == tensors[2] != tensors[3]
    assert plans[0].quality == plans[1].quality != plans[2].quality
