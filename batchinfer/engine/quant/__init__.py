"""Quantisation at build time: one module a scheme, and the calibration that feeds those that look at activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.engine.kernels import KV_DTYPES
from batchinfer.engine.kernels.linear import dense
from batchinfer.engine.kernels.linear.fp8 import has_fp8
from batchinfer.engine.model.decoder import Layer
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.quant import awq, fp8, gptq, int4, int8, kv, smoothquant
from batchinfer.engine.quant.calibration import LINEARS, Inputs, Walk
from batchinfer.engine.quant.quality import Quality, measure
from batchinfer.engine.quant.sensitivity import Cost, Trials, tried
from batchinfer.errors import ModelError

__all__ = ["GROUP_SIZE", "LINEARS", "SCHEMES", "Quantizer", "Scheme", "find_scheme"]

GROUP_SIZE = 128  # columns that share a scale, where a scheme has groups and nothing else is asked for
HELD_OUT = 4  # every so many rows measure quality, and calibrate nothing

Group = dict[str, Tensor]
# A layer's tensors in float32, what its linears are fed, the model, the group size → each linear's form. What the
# scheme scales it scales in place.
QuantizeLayer = Callable[[Group, dict[str, Inputs], DecoderSpec, int], dict[str, Group]]


@dataclass(frozen=True)
class Scheme:
    """A way to keep a layer's matrices in fewer bits."""

    name: str
    quantize: QuantizeLayer
    max_loss: float  # of perplexity, as a fraction, that a build accepts unless told otherwise
    calibrated: bool = False  # looks at inputs
    grouped: bool = False
    native: Callable[[torch.device], bool] = lambda device: True  # whether a device multiplies such numbers as they are


def _each(quantize: Callable[..., Group], *, grouped: bool = False, seen: bool = False) -> QuantizeLayer:
    """A scheme that takes linear by linear."""

    def quantize_layer(group: Group, inputs: dict[str, Inputs], spec: DecoderSpec, size: int) -> dict[str, Group]:
        made = {}
        for linear in LINEARS:
            arguments = [inputs[linear].hessian] if seen else []
            made[linear] = quantize(group[f"{linear}.weight"], *arguments, *([size] if grouped else []))
        return made

    return quantize_layer


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", _each(fp8.quantize, seen=True), 0.01, calibrated=True, native=has_fp8),
        Scheme("int8", _each(int8.quantize), 0.01),
        Scheme("int4", _each(int4.quantize, grouped=True), 0.03, grouped=True),
        Scheme("gptq", _each(gptq.quantize, grouped=True, seen=True), 0.03, calibrated=True, grouped=True),
        Scheme("awq", awq.quantize_layer, 0.03, calibrated=True, grouped=True),
        Scheme("w8a8", _each(int8.quantize_w8a8), 0.01),
        Scheme("smoothquant", smoothquant.quantize_layer, 0.01, calibrated=True),
    )
}


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


class Quantizer:
    """Quantises a model as its groups come by, and measures what that did to it."""

    def __init__(
        self,
        scheme: Scheme | None,
        group_size: int,
        spec: DecoderSpec,
        dtype: torch.dtype,
        device: torch.device,
        rows: Sequence[Sequence[int]],
        kv_dtype: str = "auto",
        kept: Collection[str] = (),
        trying: bool = False,
    ) -> None:
        """
        Args:
            scheme: None leaves the matrices as they are, for keys and values alone to be kept in fewer bits.
            group_size: columns that share a scale, -1 for one scale a row, 0 for GROUP_SIZE.
            rows: token ids; every HELD_OUT-th row is kept from calibration.
            kv_dtype: of keys and values, one of ``KV_DTYPES``.
            kept: matrices that stay as they are, named as in ``layer-003.down``.
            trying: find what each matrix costs in fewer bits.

        Raises:
            ModelError: the group size is odd, or there are too few rows to calibrate and to measure with.
        """
        if group_size < -1 or group_size % 2 and group_size != -1:
            raise ModelError(f"build.group_size must be even, -1 (one group a row) or 0 (a default), got {group_size}")
        rows = [row for row in rows if len(row) > 1]
        self.scheme, self.group_size = scheme, group_size or GROUP_SIZE
        self.spec, self.dtype, self.device, self.kv_dtype = spec, dtype, device, kv_dtype
        self.held_out = rows[::HELD_OUT]
        calibrated = kv_dtype != "auto" or scheme is not None and scheme.calibrated
        others = [row for i, row in enumerate(rows) if i % HELD_OUT]
        self.rows = others if calibrated else []
        if not self.held_out or not others and (calibrated or trying):
            raise ModelError(f"{len(rows)} rows of more than a token are too few to calibrate with; give at least 2")
        self.kept = tuple(kept)
        self._tried = tried(others) if trying else []
        # Known once the last group has come by.
        self.quality: Quality | None = None
        self.costs: dict[str, Cost] = {}

    @torch.inference_mode()
    def __call__(self, groups: Iterable[tuple[str, Group]]) -> Iterator[tuple[str, Group]]:
        """``embed``, layers in float32, ``head`` → the same with the layers' matrices quantised, one held at a time."""
        embedding = torch.empty(0)
        for name, group in groups:
            if name == "embed":
                embedding = group["weight"]
                calibrating = self._walk(embedding, self.rows) if self.rows else None
                reference = self._walk(embedding, self.held_out)
                measured = self._walk(embedding, self.held_out, KV_DTYPES[self.kv_dtype])
                trials = Trials(self._walk(embedding.float(), self._tried)) if self._tried else None
            elif name == "head":
                weight = (embedding if self.spec.tied_head else group["weight"]).to(self.device)
                norm = group["norm.weight"].to(self.device)
                self.quality = measure(measured, reference, norm, dense(weight), self.held_out)
                if trials is not None:
                    self.costs = trials.costs(norm, dense(weight.float()))
            else:
                full = Layer.from_weights(self._here(self._as_it_is(group)))
                inputs = calibrating.note(full) if calibrating is not None else {}
                reference.advance(full)
                del full
                scaled = self._here(group)
                group = self._quantized(name, scaled, inputs)
                inputs.clear()
                layer = Layer.from_weights(self._here(group))
                if trials is not None:
                    trials.advance(name, scaled, self._here(group))
                del scaled
                measured.advance(layer)
                if calibrating is not None:
                    calibrating.advance(layer)
            yield name, group

    def __str__(self) -> str:
        """What it makes of a model."""
        if self.scheme is None:
            return "keys and values in 8 bits"
        matrices, dtype = len(LINEARS) * self.spec.num_layers, str(self.dtype).removeprefix("torch.")
        return self.scheme.name + (f", {len(self.kept)} of {matrices} matrices in {dtype}" if self.kept else "")

    def _walk(self, embedding: Tensor, rows: Sequence[Sequence[int]], kv_dtype: torch.dtype | None = None) -> Walk:
        return Walk(self.spec, embedding, rows, self.device, kv_dtype)

    def _quantized(self, name: str, scaled: Group, inputs: dict[str, Inputs]) -> Group:
        """The layer as the plan keeps it. What is scaled is so in ``scaled`` too."""
        if self.kv_dtype != "auto":
            inputs = kv.fold(scaled, inputs, self.spec, kv.TARGETS[self.kv_dtype])
        forms = self.scheme.quantize(scaled, inputs, self.spec, self._size) if self.scheme is not None else {}
        made = self._as_it_is(scaled)
        for linear, parts in forms.items():
            if f"{name}.{linear}" not in self.kept:
                del made[f"{linear}.weight"]
                made |= {f"{linear}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        return {part: tensor.cpu() for part, tensor in made.items()}

    @property
    def _size(self) -> int:
        return self.group_size if self.group_size > 0 else 1 << 30

    def _as_it_is(self, group: Group) -> Group:
        """Matrices and biases in the engine's dtype, norms as they are."""
        return {name: tensor if "norm" in name else tensor.to(self.dtype) for name, tensor in group.items()}

    def _here(self, group: Group) -> Group:
        return {name: tensor.to(self.device) for name, tensor in group.items()}
