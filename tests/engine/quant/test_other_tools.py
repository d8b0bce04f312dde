"""Beside other tools: the numbers are theirs where they are installed (``pip install torchao llmcompressor``), and what
one of them wrote (see ``write``) says what it says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from batchinfer import Engine, SamplingParams
from batchinfer.engine.kernels.linear.int4 import dequantize
from batchinfer.engine.quant import awq, gptq
from batchinfer.engine.quant.calibration import Inputs
from batchinfer.engine.quant.int4 import Grid
from tests.engine.quant.write import OUTPUT, PROMPTS, WRITTEN
from tests.engine.tiny import make_tokenizer
from tests.engine.train import TRAINED

GROUP = 32


@pytest.fixture(scope="module", params=["self_attn.q_proj", "mlp.gate_proj"])
def layer(request):
    """A matrix of the trained model, and inputs as models have them: correlated, some channels larger than others."""
    weight = load_file(TRAINED / "model.safetensors")[f"model.layers.1.{request.param}.weight"].float()
    torch.manual_seed(0)
    inputs = weight.shape[1]
    x = torch.randn(2048, 32) @ torch.randn(32, inputs) + torch.randn(2048, inputs)
    return weight, x * (torch.rand(inputs) * 3) ** 2


def test_awq_finds_the_scales_that_torchao_finds(layer):
    core = pytest.importorskip("torchao.prototype.awq.core")
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    weight, x = layer
    rounding = IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP), mapping_type=MappingType.ASYMMETRIC)
    theirs = core.AWQObserver(weight, None, rounding)
    theirs(x, None)
    inputs = Inputs([x])
    ours = awq.search_scale(weight, inputs, inputs.mean, GROUP)
    assert float(ours.max() / ours.min()) > 2
    torch.testing.assert_close(ours, theirs.calculate_qparams(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_rounds_as_llmcompressor_rounds(layer, act_order):
    module = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    from compressed_tensors.quantization import QuantizationArgs

    weight, x = layer
    hessian, grid = Inputs([x]).hessian, Grid.over(weight, GROUP)
    arguments = QuantizationArgs(
        num_bits=4, symmetric=False, strategy="group", group_size=GROUP, actorder="weight" if act_order else None
    )
    signed = (grid.zero - 8).to(torch.int8)
    theirs, *_ = module.quantize_weight(
        weight[None].clone(), hessian[None].clone(), grid.scale[None], signed[None], None, arguments
    )
    made = gptq.quantize(weight, hessian, GROUP, act_order=act_order)
    ours = dequantize(made["int4"], made["scale"], made["zero"], GROUP)
    rounded = Grid.over(weight, GROUP).rounded(weight, GROUP)
    alike = (ours - theirs[0]).abs() < 1e-5
    assert (rounded - theirs[0]).abs().lt(1e-5).float().mean() < 0.9 < 0.999 < alike.float().mean()


def said(name: str, folder: Path) -> tuple[str, list[list[int]]]:
    """How a written checkpoint is quantised, and what it says to PROMPTS."""
    shutil.copytree(WRITTEN / name, folder / name)
    make_tokenizer().save_pretrained(folder / name)
    engine = Engine(folder / name, device="cpu", dtype="float32", seq_len=64, progress=False)
    done = engine.generate(PROMPTS, SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
    answers = {completion.key: completion.outputs[0].token_ids for completion in done}
    return engine.plan.quantization, [answers[key] for key in sorted(answers)]


@pytest.mark.parametrize("form", ["awq", "gptq"])
def test_what_another_tool_wrote_says_what_the_tool_takes_it_for(tmp_path, form):
    assert said(form, tmp_path) == (form, said("plain", tmp_path)[1])


def test_what_a_search_for_scales_wrote_says_what_its_tool_says(tmp_path):
    answers = json.loads((WRITTEN / "searched" / "said.json").read_text())
    assert said("searched", tmp_path) == ("compressed-tensors", answers)
