"""Checkpoints that come quantised say what they say: their numbers are taken as other tools wrote them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchinfer import Engine, SamplingParams
from batchinfer.engine.build import build
from batchinfer.engine.model.quantized import QuantizedCheckpoint
from batchinfer.errors import ModelError
from tests.engine.tiny import make_model

N, K, SIZE = 16, 32, 8
PROMPTS = [[(7 * i * j + j) % 256 for j in range(12)] for i in range(1, 13)]


class Held(dict):
    get = dict.__getitem__
    has = dict.__contains__


def bits(rows: list[list[int]]) -> torch.Tensor:
    """Eight 4-bit numbers an int32, the first in the lowest bits."""
    words = [[sum(row[i + n] << 4 * n for n in range(8)) for i in range(0, len(row), 8)] for row in rows]
    return torch.tensor([[word - (word >> 31 << 32) for word in row] for row in words], dtype=torch.int32)


@pytest.fixture
def numbers():
    """Codes [N][K], zeros [N][groups], scales [N, groups] and the weight that they stand for."""
    torch.manual_seed(5)
    codes, zeros = torch.randint(0, 16, (N, K)), torch.randint(1, 16, (N, K // SIZE))
    scales = (torch.rand(N, K // SIZE) / 10).half()
    weight = (codes - zeros.repeat_interleave(SIZE, 1)) * scales.float().repeat_interleave(SIZE, 1)
    return codes, zeros, scales, weight


def weight_of(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    from batchinfer.engine.kernels.linear.int4 import dequantize

    made = dequantize(parts["int4"], parts["scale"], parts["zero"], int(parts["group"]))
    if "order" in parts:
        made = torch.empty_like(made).index_copy_(1, parts["order"].long(), made)
    return made


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(numbers, version, act_order):
    codes, zeros, scales, weight = numbers
    groups = torch.arange(K) // SIZE
    if act_order:  # column i belongs to any group
        shuffled = torch.randperm(K)
        codes, weight, groups = codes[:, shuffled], weight[:, shuffled], groups[shuffled]
    stored = zeros - 1 if version == "gptq" else zeros
    tensors = Held(
        {
            "o.qweight": bits(codes.tolist()).T.contiguous(),
            "o.qzeros": bits(stored.T.tolist()),
            "o.scales": scales.T.contiguous(),
            "o.g_idx": groups.int(),
        }
    )
    config = {"quant_method": "gptq", "bits": 4, "group_size": SIZE, "checkpoint_format": version}
    assert torch.equal(weight_of(QuantizedCheckpoint(config, tensors).linear(["o"])), weight)


def test_awq(numbers):
    codes, zeros, scales, weight = numbers

    def interleaved(rows: torch.Tensor) -> torch.Tensor:
        """Of eight neighbours the even ones first, then the odd ones."""
        return bits(rows.view(len(rows), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1).tolist())

    tensors = Held({"o.qweight": interleaved(codes.T), "o.qzeros": interleaved(zeros.T), "o.scales": scales.T})
    config = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "version": "gemm"}
    assert torch.equal(weight_of(QuantizedCheckpoint(config, tensors).linear(["o"])), weight)


def compressed(form: str, bits: int, size: int | None = None, activations: bool = False) -> dict:
    group = {
        "weights": {"num_bits": bits, "group_size": size},
        "input_activations": {} if not activations else {"a": 1},
    }
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def test_compressed_tensors_in_four_bits(numbers):
    codes, zeros, scales, weight = numbers
    tensors = Held(
        {
            "o.weight_packed": bits(codes.tolist()),
            "o.weight_zero_point": bits(zeros.T.tolist()).T.contiguous(),
            "o.weight_scale": scales,
            "o.weight_shape": torch.tensor([N, K]),
        }
    )
    made = QuantizedCheckpoint(compressed("pack-quantized", 4, SIZE), tensors).linear(["o"])
    assert torch.equal(weight_of(made), weight)
    del tensors["o.weight_zero_point"]
    symmetric = (codes - 8) * scales.float().repeat_interleave(SIZE, 1)
    made = QuantizedCheckpoint(compressed("pack-quantized", 4, SIZE), tensors).linear(["o"])
    assert torch.equal(weight_of(made), symmetric)


def test_linears_in_other_column_orders_are_not_fused(numbers):
    codes, zeros, scales, _ = numbers
    tensors = Held()
    for name, groups in (("q", torch.arange(K) // SIZE), ("k", torch.arange(K).flip(0) // SIZE)):
        tensors |= {
            f"{name}.qweight": bits(codes.tolist()).T,
            f"{name}.qzeros": bits((zeros - 1).T.tolist()),
            f"{name}.scales": scales.T,
            f"{name}.g_idx": groups.int(),
        }
    config = {"quant_method": "gptq", "bits": 4, "group_size": SIZE}
    with pytest.raises(ModelError, match="q, k are quantised in different ways or column orders"):
        QuantizedCheckpoint(config, tensors).linear(["q", "k"])


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes", "bits": 4},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ],
)
def test_what_no_linear_computes_is_refused(config):
    with pytest.raises(ModelError, match=f"quantised .{config['quant_method']}.*supported are 4-bit GPTQ"):
        QuantizedCheckpoint(config, Held())


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors"])
def test_an_fp8_checkpoint_becomes_the_engine_that_our_own_build_makes(tmp_path, method):
    """Rows of its matrices all have one scale, so that per-tensor scales lose nothing either."""
    folder = make_model(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    plain, stored = load_file(file), {}
    for name, tensor in plain.items():
        if "_proj" not in name:
            stored[name] = tensor
            continue
        tensor[:, 0] = tensor.abs().max()  # the largest of every row
        scale = tensor[0, 0] / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        plain[name] = stored[name].float() * scale  # so that nothing is left to round
        stored[f"{name}_scale"] = scale if method == "modelopt" else scale.expand(len(tensor), 1).clone()
    config = json.loads((folder / "config.json").read_text())
    save_file(plain, file, {"format": "pt"})
    options = dict(dtype="bfloat16", device="cpu", seq_len=64, progress=False)
    ours = build(str(folder), tmp_path / "ours", quantization="fp8", max_quality_loss=1e9, **options)
    save_file(stored, file, {"format": "pt"})
    how = (
        {"quant_method": "modelopt", "quant_algo": "FP8"} if method == "modelopt" else compressed("float-quantized", 8)
    )
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(ModelError, match="quantised already"):
        build(str(folder), tmp_path / "again", quantization="int4", **options)
    theirs = build(str(folder), tmp_path / "theirs", **options)
    assert theirs.quantization == method and theirs.quality is None
    said = []
    for plan in (ours, theirs):
        done = Engine(plan).generate(PROMPTS, SamplingParams(max_tokens=6, ignore_eos=True))
        said.append({c.key: c.outputs[0].token_ids for c in done})
    assert said[0] == said[1]
