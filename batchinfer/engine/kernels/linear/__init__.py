"""Linear: y = x @ weight.T + bias, one class for each form that a weight is kept in.

Contract: x ``dtype[T, K]`` → ``dtype[T, N]``, accumulated in float32 or int32. A plan holds the linear ``qkv`` as one
tensor named by its form, ``qkv.weight`` or ``qkv.fp8`` …, with what belongs to it beside: ``qkv.scale``, ``qkv.bias``.
The reference of every form is ``torch.nn.functional.linear`` with the weight that its numbers stand for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from batchinfer.engine.kernels.linear.dense import Linear, dense, dense_contenders, own_products
from batchinfer.engine.kernels.linear.fp8 import Fp8Linear, multiplies_fp8
from batchinfer.engine.kernels.linear.int4 import Int4Linear
from batchinfer.engine.kernels.linear.int8 import Int8Linear, W8A8Linear

__all__ = [
    "FORMS",
    "Fp8Linear",
    "Int4Linear",
    "Int8Linear",
    "Linear",
    "W8A8Linear",
    "dense",
    "form_of",
    "linear_contenders",
    "load_linear",
]

# form → what makes a Linear of the tensors that belong to it, by their names
FORMS: dict[str, Callable[..., Linear]] = {
    "weight": dense,
    "int8": Int8Linear,
    "int4": Int4Linear,
    "w8a8": W8A8Linear,
    "fp8": Fp8Linear,
}


def load_linear(group: dict[str, Tensor], name: str, winners: Mapping[str, str] = MappingProxyType({})) -> Linear:
    """The linear ``name`` of a plan's group, where its tensors lie and in the form in which they are there.

    Args:
        winners: linear and form, as ``qkv.fp8`` → who is to compute it; for what is not named, or named by one that
            does not work here, whoever is likely to be fastest.
    """
    form, contenders = linear_contenders(group, name)
    return contenders.get(winners.get(f"{name}.{form}"), next(iter(contenders.values())))()


def linear_contenders(group: dict[str, Tensor], name: str) -> tuple[str, dict[str, Callable[..., Linear]]]:
    """The form of a linear, and what makes it, one for each way that works where its tensors lie.

    Those that are likely to be fastest come first.
    """
    form, parts = form_of(group, name), _parts(group, name)
    weight, made = parts[form], FORMS[form]
    slow = functools.partial(made, fast=False)
    if form == "weight":
        ways = dense_contenders(weight)
    elif weight.device.type == "cpu" and own_products():
        ways = {"own": made, "torch": slow}
    elif form == "fp8" and multiplies_fp8(weight):
        ways = {"scaled_mm": made, "torch": slow}
    else:
        ways = {"torch": slow}
    return form, {contender: functools.partial(make, **parts) for contender, make in ways.items()}


def form_of(group: dict[str, Tensor], name: str) -> str:
    """The form in which the linear ``name`` of a plan's group is kept."""
    [form] = FORMS.keys() & _parts(group, name).keys()
    return form


def _parts(group: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in group.items() if key.startswith(f"{name}.")}
