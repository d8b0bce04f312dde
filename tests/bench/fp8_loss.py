"""Which side of an FP8 product loses what: ``python -m tests.bench.fp8_loss [MODEL]``, three minutes of two cores.

Weights and activations are rounded to e4m3 each without the other, weights also as the build rounds them, with a look
at calibration's activations; given a plan, all but the matrices that it keeps as they are. All are measured on the same
rows, which no calibration saw.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from batchinfer.engine.build import choose_device
from batchinfer.engine.kernels.linear import Linear, dense
from batchinfer.engine.kernels.linear.fp8 import E4M3, quantize_e4m3
from batchinfer.engine.model.decoder import Layer
from batchinfer.engine.model.source import ModelSource
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.model.tokenizer import write_tokenizer
from batchinfer.engine.model.weights import convert
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.quant import HELD_OUT, LINEARS, fp8, kv
from batchinfer.engine.quant.calibration import Inputs, Walk
from batchinfer.engine.quant.default import default_rows
from batchinfer.engine.quant.quality import measure
from batchinfer.engine.text import Text

DTYPE = torch.bfloat16
Weights = Callable[[Tensor, Inputs], dict[str, Tensor]]


class Halfway:
    """A linear whose inputs alone are rounded, whatever its weight is."""

    def __init__(self, product: Linear) -> None:
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        rounded, scale = quantize_e4m3(x)
        return self._product((rounded.float() * scale).to(x.dtype))


@dataclass
class Variant:
    name: str
    weights: Weights | None  # in e4m3; None as they are
    activations: bool
    keys_and_values: bool = False
    kept: tuple[str, ...] = ()  # matrices that stay as they are
    walks: tuple[Walk, ...] = ()  # of the rows that measure, and of those that calibrate

    def advance(self, name: str, layer: dict[str, Tensor], spec: DecoderSpec) -> None:
        linears = [linear for linear in LINEARS if f"{name}.{linear}" not in self.kept]
        whole = Layer.from_weights({name: _as_computed(name, tensor) for name, tensor in layer.items()})
        inputs = self.walks[1].note(whole) if len(self.walks) > 1 else {}
        if self.keys_and_values:
            layer = dict(layer)
            kv.fold(layer, inputs, spec, kv.TARGETS["fp8"])
        made = {name: _as_computed(name, tensor) for name, tensor in layer.items()}
        if self.weights is not None:
            for linear in linears:
                form = self.weights(layer[f"{linear}.weight"], inputs.get(linear))
                made[f"{linear}.weight"] = (form["fp8"].float() * form["scale"][:, None]).to(DTYPE)
        rounded = Layer.from_weights(made)
        if self.activations:
            rounded = replace(rounded, **{linear: Halfway(getattr(rounded, linear)) for linear in linears})
        for walk in self.walks:
            walk.advance(rounded)


def _as_computed(name: str, tensor: Tensor) -> Tensor:
    return tensor if "norm" in name else tensor.to(DTYPE)


def _nearest(weight: Tensor, _: Inputs) -> dict[str, Tensor]:
    return fp8.quantize(weight)


def _calibrated(weight: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    return fp8.quantize(weight, inputs.hessian)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=32768, help="a quarter measures, another calibrates")
    parser.add_argument("--plan", type=Path, help="an engine that keeps some matrices as they are")
    options = parser.parse_args()
    source, device = ModelSource.resolve(options.model), torch.device(choose_device("auto"))
    spec = DecoderSpec.from_config(source.config())
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(source, Path(folder))
        rows = default_rows(Text(Path(folder)), options.tokens)
    held_out, calibration = rows[::HELD_OUT], rows[1::HELD_OUT]
    variants = [
        Variant("weights, to nearest", _nearest, False),
        Variant("weights, calibrated", _calibrated, False),
        Variant("activations", None, True),
        Variant("keys and values", None, False, keys_and_values=True),
        Variant("weights to nearest, and activations", _nearest, True),
        Variant("weights calibrated, and activations", _calibrated, True),
    ]
    if options.plan is not None:
        kept = EnginePlan.load(options.plan).kept
        told = f"weights calibrated, and activations, {len(kept)} of {len(LINEARS) * spec.num_layers} matrices kept"
        variants.append(Variant(told, _calibrated, True, kept=kept))
    groups = convert(source, spec, DTYPE, torch.float32)
    _, embed = next(groups)
    embedding = embed["weight"]
    reference = Walk(spec, embedding, held_out, device)
    for variant in variants:
        calibrates = variant.weights is _calibrated or variant.keys_and_values
        kept_as = E4M3 if variant.keys_and_values else None
        walks = Walk(spec, embedding, held_out, device, kept_as), Walk(spec, embedding, calibration, device)
        variant.walks = walks if calibrates else walks[:1]
    for name, group in groups:
        if name == "head":
            head = dense((embedding if spec.tied_head else group["weight"]).to(device))
            for variant in variants:
                told = measure(variant.walks[0], reference, group["norm.weight"].to(device), head, held_out)
                print(f"{variant.name:36} {told}", flush=True)
            return
        layer = {part: tensor.to(device) for part, tensor in group.items()}
        reference.advance(Layer.from_weights({part: _as_computed(part, tensor) for part, tensor in layer.items()}))
        for variant in variants:
            variant.advance(name, layer, spec)


if __name__ == "__main__":
    main()
