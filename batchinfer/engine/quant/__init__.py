"""Quantisation at build time: one module a scheme, and the calibration that feeds those that look at activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.engine.quant import fp8
from batchinfer.errors import ModelError

__all__ = ["LINEARS", "SCHEMES", "Scheme", "find_scheme", "quantize", "quantize_layer"]

# The matrices of a layer. Embedding and head stay as they are: they are a small part of a model, and errors in them
# reach the tokens undamped.
LINEARS = ("qkv", "o", "gate_up", "down")

Group = dict[str, Tensor]


@dataclass(frozen=True)
class Scheme:
    """A way to keep a layer's matrices in fewer bits."""

    name: str
    quantize: Callable[[Tensor], Group]  # float32 weight [N, K] → the tensors of its form, without the linear's name
    max_loss: float  # of perplexity, as a fraction, that a build accepts unless told otherwise


SCHEMES = {scheme.name: scheme for scheme in (Scheme("fp8", fp8.quantize, 0.01),)}


def find_scheme(name: str) -> Scheme | None:
    """The scheme of that name; None for ``auto`` and ``none``, which leave a model as it is.

    Raises:
        ModelError: there is no such scheme.
    """
    if name in ("auto", "none"):
        return None
    if name not in SCHEMES:
        raise ModelError(f"build.quantization must be none or one of {', '.join(SCHEMES)}, got {name!r}")
    return SCHEMES[name]


def quantize(groups: Iterable[tuple[str, Group]], scheme: Scheme, dtype: torch.dtype) -> Iterator[tuple[str, Group]]:
    """A model's groups, their layers' matrices from float32 into the scheme's form. One layer at a time is held."""
    for name, group in groups:
        yield name, quantize_layer(group, scheme, dtype) if name.startswith("layer-") else group


def quantize_layer(group: Group, scheme: Scheme, dtype: torch.dtype) -> Group:
    """A layer's tensors with its matrices in the scheme's form; biases in ``dtype``, norms as they are."""
    made = {}
    for name, tensor in group.items():
        linear, _, part = name.partition(".")
        if part == "weight" and linear in LINEARS:
            made |= {f"{linear}.{key}": value for key, value in scheme.quantize(tensor).items()}
        else:
            made[name] = tensor.to(dtype) if part == "bias" else tensor
    return made
