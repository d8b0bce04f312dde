"""Every form of a quantised weight gives the product of the numbers that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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
    return F.linear(x.float(), made[form].float() * made["scale"][:, None])


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
