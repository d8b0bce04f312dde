"""Every form of a quantised weight gives the product of the numbers that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batchinfer.engine.kernels.activation import silu_mul
from batchinfer.engine.kernels.cpu import linear as cpu
from batchinfer.engine.kernels.linear import load_linear
from batchinfer.engine.kernels.linear.fp8 import quantize_e4m3
from batchinfer.engine.kernels.linear.int4 import dequantize, pack, unpack
from batchinfer.engine.kernels.linear.int8 import quantize_int8
from batchinfer.engine.quant import fp8, int4, int8
from tests.engine.tiny import DEVICES

QUANTIZE = {
    "int8": int8.quantize,
    "w8a8": int8.quantize_w8a8,
    "weight": lambda weight: {"weight": weight.bfloat16()},
    "fp8": fp8.quantize,
    "int4-32": lambda weight: int4.quantize(weight, 32),
    "int4-128": lambda weight: int4.quantize(weight, 128),
}
SHAPES = [(1, 32, 16), (3, 48, 80), (13, 80, 40), (64, 576, 96), (40, 200, 33)]  # tokens, inputs, outputs


def expected(form: str, x: torch.Tensor, made: dict[str, torch.Tensor]) -> torch.Tensor:
    """In float32, with the numbers that x and the weight are rounded to."""
    if form.startswith("int4"):
        weight = dequantize(made["int4"], made["scale"], made["zero"], int(made["group"]))
        return F.linear(x.float(), weight.to(x.dtype).float())
    if form in ("w8a8", "fp8"):
        codes, scale = (quantize_int8 if form == "w8a8" else quantize_e4m3)(x)
        x = codes.float() * scale
    return F.linear(x.float(), made[form].float() * (made["scale"][:, None] if "scale" in made else 1))


@pytest.fixture(params=["fast", "reference"])
def products(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(cpu, "operators", lambda: None)
    elif cpu.operators() is None:
        pytest.skip("this CPU has no products with quantised weights")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("form", QUANTIZE)
def test_a_linear_is_the_product_of_the_numbers_it_stands_for(products, device, form, tokens, inputs, outputs):
    torch.manual_seed(tokens)
    x, weight, bias = torch.randn(tokens, inputs), torch.randn(outputs, inputs) * 0.1, torch.randn(outputs)
    weight[0] = 0
    weight[outputs // 2] *= 30
    x, made = x.bfloat16().to(device), QUANTIZE[form](weight.to(device))
    for given in (None, bias.bfloat16().to(device)):
        group = {f"o.{part}": tensor.to(device) for part, tensor in made.items()}
        if given is not None:
            group["o.bias"] = given
        got = load_linear(group, "o")(x)
        wanted = expected(form, x, made) + (0 if given is None else given.float())
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=3e-2)


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("form", [form for form in QUANTIZE if form != "weight"])
def test_activations_in_float32_are_multiplied_in_float32(products, form, tokens, inputs, outputs):
    torch.manual_seed(tokens)
    x, bias = torch.randn(tokens, inputs), torch.randn(outputs)
    made = QUANTIZE[form](torch.randn(outputs, inputs) * 0.1)
    got = load_linear({f"o.{part}": tensor for part, tensor in made.items()} | {"o.bias": bias}, "o")(x)
    torch.testing.assert_close(got, expected(form, x, made) + bias, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", ["weight", "w8a8"])
def test_gate_and_up_become_their_product_at_once(form, threads):
    if cpu.operators() is None or not cpu.operators().best_bf16():
        pytest.skip("this CPU has no products that gate")
    torch.set_num_threads(threads)
    for seed in range(12):
        torch.manual_seed(seed)
        tokens, inputs, half = (int(torch.randint(1, most, ())) for most in (90, 150, 12))
        inputs, half = inputs * 2, half * 16
        x, weight = torch.randn(tokens, inputs).bfloat16(), torch.randn(2 * half, inputs) * 0.3
        group = {f"gate_up.{part}": tensor for part, tensor in QUANTIZE[form](weight).items()}
        if seed % 2:
            group["gate_up.bias"] = torch.randn(2 * half).bfloat16()
        linear = load_linear(group, "gate_up")
        out = torch.full((tokens, half), float("nan"), dtype=torch.bfloat16)
        assert linear.gated(x, out) is out
        torch.testing.assert_close(out, silu_mul(linear(x), torch.empty_like(out)), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("outputs", [64, 77])
def test_rows_of_a_weight_can_be_read_in_any_order(outputs):
    weight = torch.randn(outputs, 40).bfloat16()
    linear = load_linear({"o.weight": weight}, "o")
    if linear.rows is None:
        pytest.skip("this CPU's product keeps its weight to itself")
    channels = torch.randint(0, outputs, (50,))
    assert torch.equal(linear.rows(channels), weight[channels])


@pytest.mark.parametrize("form", ["weight", "w8a8"])
def test_a_row_is_the_same_bits_with_any_others_and_any_threads(form):
    weight = torch.randn(176, 64)
    linear = load_linear({f"o.{part}": tensor for part, tensor in QUANTIZE[form](weight).items()}, "o")
    x = torch.randn(101, 64).bfloat16()
    together = linear(x)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(linear(x), together)
        assert torch.equal(linear(x[40:41]), together[40:41])
        assert torch.equal(linear(x[7:60]), together[7:60])


def test_an_infinite_or_missing_number_is_not_hidden_by_rounding(products):
    made = load_linear({f"o.{part}": t for part, t in int8.quantize_w8a8(torch.randn(16, 40)).items()}, "o")
    x = torch.randn(4, 40).bfloat16()
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    finite = made(x).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, False, True]


def test_columns_may_come_in_another_order(products):
    torch.manual_seed(0)
    weight, x, order = torch.randn(48, 64), torch.randn(5, 64).bfloat16(), torch.randperm(64)
    made = int4.quantize(weight[:, order], 32)
    straight = load_linear({f"o.{part}": tensor for part, tensor in made.items()}, "o")
    ordered = load_linear({f"o.{part}": t for part, t in (made | {"order": order.int()}).items()}, "o")
    assert torch.equal(ordered(x), straight(x[:, order]))


def test_packing_is_undone_by_unpacking():
    codes = torch.randint(0, 16, (7, 30), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("group", [32, 128, 576])
def test_rounding_to_a_grid_is_off_by_half_a_step_at_most(group):
    torch.manual_seed(1)
    weight = torch.randn(20, 576)
    made = int4.quantize(weight, group)
    error = (dequantize(made["int4"], made["scale"], made["zero"], group) - weight).abs()
    steps = made["scale"].repeat_interleave(group, 1)[:, :576]
    assert (error <= steps * 0.5001 + steps * 0.5).all()  # the zero point is rounded too
    assert (error <= steps * 0.5001).float().mean() > 0.97
