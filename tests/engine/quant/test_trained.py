"""On a model that has learnt something (tests.engine.train), schemes lose what they may, in the order they should."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from batchinfer.engine.build import build
from batchinfer.engine.quant.default import default_rows
from batchinfer.engine.text import Text
from tests.engine.train import TRAINED

TOKENS = 6144  # of a manual that the model has not read; every fourth row measures


@pytest.fixture(scope="module")
def loss(tmp_path_factory):
    """How much perplexity grows with a scheme, as a fraction."""
    rows = default_rows(Text(TRAINED), TOKENS)

    @functools.cache
    def loss(quantization: str, kv_dtype: str = "auto", model: Path = TRAINED) -> float:
        folder = tmp_path_factory.mktemp("engine") / "engine"
        options = dict(device="cpu", dtype="bfloat16", seq_len=512, max_quality_loss=1e9, progress=False)
        options |= dict(group_size=-1, calibration=rows)
        plan = build(str(model), folder, quantization=quantization, kv_dtype=kv_dtype, **options)
        assert plan.quality["reference_perplexity"] < 100, "of 2048 tokens: it has learnt"
        return plan.quality["perplexity"] / plan.quality["reference_perplexity"] - 1

    return loss


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """The same function, bit for bit, with every 40th channel of what its linears are fed 64 times as large."""
    folder = tmp_path_factory.mktemp("outliers") / "model"
    shutil.copytree(TRAINED, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[::40] *= 64
        elif any(linear in name for linear in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, ::40] /= 64
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_gptq_and_awq_beat_rounding_at_4_bits(loss):
    assert loss("gptq") < 0.7 * loss("int4")
    assert loss("awq") < 0.9 * loss("int4")


def test_smoothquant_beats_rounding_both_sides_as_they_are(loss, outliers):
    # Without outliers both lose next to nothing, and which of them less is the processor's rounding.
    assert loss("smoothquant", model=outliers) < 0.01 < 0.1 * loss("w8a8", model=outliers)


def test_8_bits_lose_less_than_a_hundredth(loss):
    assert max(map(loss, ("fp8", "int8", "w8a8", "smoothquant"))) < 0.01
    assert loss("none", "int8") < 0.01
