"""Keys and values in 8 bits: what calibration folds into a layer changes nothing but how much of the range is used."""

from __future__ import annotations

import pytest
import torch

from batchinfer import Engine, SamplingParams
from batchinfer.engine.build import build
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.quant import kv
from batchinfer.engine.quant.calibration import Inputs
from batchinfer.errors import ModelError
from tests.engine.tiny import make_model

TINY = DecoderSpec("llama", 320, 64, 96, 1, 4, 2, 16, 1e-5, 128, True)
ROWS = [[(7 * i * j + j) % 256 for j in range(40)] for i in range(1, 13)]


@pytest.fixture
def layer():
    torch.manual_seed(0)
    inputs = {name: Inputs([torch.randn(50, 64)]) for name in ("qkv", "o", "gate_up", "down")}
    return {"qkv.weight": torch.randn(128, 64), "qkv.bias": torch.randn(128), "o.weight": torch.randn(64, 64)}, inputs


def attended(group, x):
    """What a layer adds to each token that looks at itself and the first: queries times keys, then values through o."""
    q, k, v = (x @ group["qkv.weight"].T + group["qkv.bias"]).view(len(x), 8, 16).split([4, 2, 2], dim=1)
    k, v = (one.repeat_interleave(2, dim=1) for one in (k, v))
    scores = (q * k).sum(-1), (q * k[:1]).sum(-1)
    weights = (scores[0] - scores[1]).sigmoid()[..., None]
    return (weights * v + (1 - weights) * v[:1]).flatten(1) @ group["o.weight"].T


def test_folded_scales_change_no_product_and_fill_the_range(layer):
    group, inputs = layer
    x = inputs["qkv"].chunks[0]
    before = attended(group, x)
    fed = kv.fold(group, inputs, TINY, 127.0)
    torch.testing.assert_close(attended(group, x), before, rtol=1e-3, atol=1e-3)
    for most in kv.largest(group, inputs["qkv"], TINY):
        torch.testing.assert_close(most, torch.full((2,), 127.0))
    was, now = inputs["o"].chunks[0], fed["o"].chunks[0]
    scale = (was / now).mean(0)
    torch.testing.assert_close(was / now, scale.expand_as(was), rtol=1e-4, atol=0)
    each = scale.view(2, 32)  # all that a KV head gives has one
    torch.testing.assert_close(each, each[:, :1].expand_as(each), rtol=1e-4, atol=0)


def test_keys_that_are_normalised_are_scaled_there(layer):
    group, inputs = layer
    group |= {"q_norm.weight": torch.rand(16) + 0.5, "k_norm.weight": torch.rand(16) + 0.5}
    before = group["q_norm.weight"] * group["k_norm.weight"]
    keys = group["qkv.weight"][64:96].clone()
    kv.fold(group, inputs, TINY, 127.0)
    torch.testing.assert_close(group["q_norm.weight"] * group["k_norm.weight"], before)
    assert torch.equal(group["qkv.weight"][64:96], keys)
    assert float(kv.largest(group, inputs["qkv"], TINY)[0].max()) == pytest.approx(127, rel=1e-4)


@pytest.mark.parametrize("scheme", ["none", "gptq"])
def test_an_engine_with_keys_and_values_in_8_bits_is_half_as_large_there_and_is_measured(tmp_path, scheme):
    folder = str(make_model(tmp_path / "model", "qwen2"))
    options = dict(device="cpu", dtype="bfloat16", seq_len=64, calibration=ROWS, max_quality_loss=1e9, progress=False)
    plain = Engine(build(folder, tmp_path / "plain", **options))
    small = Engine(build(folder, tmp_path / "small", quantization=scheme, kv_dtype="int8", **options))
    assert small.plan.quality["tokens"] == 3 * 39
    assert small.plan.quality["agreement"] > (0.8 if scheme == "none" else 0.3)
    assert 2 * small.stage.caches[0][0].nbytes == plain.stage.caches[0][0].nbytes
    done = list(small.generate(ROWS, SamplingParams(max_tokens=3, ignore_eos=True)))
    assert all(len(completion.outputs[0].token_ids) == 3 for completion in done)


def test_a_model_that_comes_quantised_is_refused(tmp_path):
    folder = make_model(tmp_path / "model", "llama")
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq", "bits": 4},', 1)
    )
    with pytest.raises(ModelError, match="scales matrices before they are quantised"):
        build(str(folder), tmp_path / "engine", device="cpu", kv_dtype="int8", progress=False)
