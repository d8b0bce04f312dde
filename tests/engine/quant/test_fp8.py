"""FP8 W8A8: what rounding to e4m3 costs, and the linear that computes with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batchinfer import Engine, SamplingParams
from batchinfer.engine.build import build
from batchinfer.engine.kernels.linear import Fp8Linear, load_linear
from batchinfer.engine.kernels.linear.fp8 import MOST, quantize_e4m3
from batchinfer.engine.plan import describe
from batchinfer.engine.quant import fp8
from tests.engine.tiny import DEVICES, make_model

ROWS = [[(7 * i * j + j) % 256 for j in range(40)] for i in range(1, 13)]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_row_is_kept_to_three_bits_of_mantissa_whatever_its_size():
    x = matrix(5, 64) * torch.tensor([[1e-6], [1.0], [1e6], [0.0], [1e-30]])
    x[1, 3] = 1e4  # an outlier: the small ones of its row lose precision, those of other rows do not
    quantised, scale = quantize_e4m3(x)
    error = (quantised.float() * scale - x).abs()
    steps = torch.maximum(x.abs() / 16, x.abs().amax(1, keepdim=True) / MOST * 2**-9)
    assert (error <= steps * 1.001).all()
    assert error[2].amax() < 1e6 / 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 32, 48), (17, 64, 32), (5, 24, 20)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_linear_is_that_of_its_rounded_numbers(device, tokens, inputs, outputs, bias):
    x, weight = matrix(tokens, inputs).bfloat16().to(device), matrix(outputs, inputs, 1).to(device)
    group = {f"o.{part}": tensor for part, tensor in fp8.quantize(weight).items()}
    if bias:
        group["o.bias"] = matrix(1, outputs, 2)[0].bfloat16().to(device)
    made = load_linear(group, "o")
    assert isinstance(made, Fp8Linear) and made.input_dtype == torch.float8_e4m3fn
    rounded = [quantised.float() * scale for quantised, scale in map(quantize_e4m3, (x, weight))]
    expected = F.linear(*rounded, group.get("o.bias", torch.zeros(outputs, device=device)).float())
    torch.testing.assert_close(made(x).float(), expected, rtol=2e-2, atol=5e-2)
    assert torch.equal(made(*quantize_e4m3(x)), made(x))  # whoever made x may have quantised it already


@pytest.mark.parametrize("device", DEVICES)
def test_an_engine_in_fp8_says_nearly_what_it_says_in_full(tmp_path, device, monkeypatch):
    """Each matrix comes after one of its own form and after one of the other."""
    folder = make_model(tmp_path / "model", "qwen2")
    prompts = [[1, 2, 3, 4 + i, 5] for i in range(64)]
    options = dict(device=device, dtype="bfloat16", seq_len=64, max_quality_loss=9, calibration=ROWS, progress=False)
    in_part = ("layer-000.gate_up", "layer-000.o", "layer-001.down", "layer-001.o", "layer-002.qkv")
    said = {}
    for name, quantization, kept in (("in full", "none", ()), ("fp8", "fp8", ()), ("in part", "fp8", in_part)):
        monkeypatch.setattr("batchinfer.engine.build.within", lambda _, quantised, kept=kept: quantised(kept=kept))
        plan = build(str(folder), tmp_path / name, quantization=quantization, **options)
        assert plan.quantization == quantization and plan.kept == kept
        done = Engine(plan).generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))
        said[name] = [token for c in sorted(done, key=lambda c: c.key) for token in c.outputs[0].token_ids]
    for name in ("fp8", "in part"):
        equal = sum(a == b for a, b in zip(said["in full"], said[name]))
        assert equal > 0.4 * len(said["in full"])  # by chance one of 320


def test_equal_builds_are_equal_and_another_quantisation_is_another_engine(tmp_path, capsys):
    folder = make_model(tmp_path / "model", "llama")
    options = dict(seq_len=64, device="cpu", max_quality_loss=9, calibration=ROWS)
    plans = [
        build(str(folder), tmp_path / f"engine-{i}", quantization=quantization, **options)
        for i, quantization in enumerate(["fp8", "fp8", "none"])
    ]
    assert describe(plans[0]) == describe(plans[1]) != describe(plans[2])
    assert plans[0].fingerprint == plans[1].fingerprint
    assert capsys.readouterr().err.count("does not multiply fp8: emulated") == 2
    assert "qkv.fp8 emulated, 80×48" in plans[0].explain()
