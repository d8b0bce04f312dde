"""Checkpoints that come quantised: GPTQ, AWQ, compressed-tensors and Model-Optimizer FP8, in our own forms.

Their numbers are kept as they are, only their order changes. Activations of W8A8 checkpoints are scaled token by token,
which is finer than the static scales that some carry.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from batchinfer.engine.kernels.linear.int4 import pack
from batchinfer.errors import ModelError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each nibble of an int32 belongs to
_FORMS = "4-bit GPTQ and AWQ, compressed-tensors in pack-, int- and float-quantized form, Model-Optimizer FP8"

Parts = dict[str, Tensor]


class Tensors(Protocol):
    def get(self, name: str) -> Tensor: ...
    def has(self, name: str) -> bool: ...


class QuantizedCheckpoint:
    """Reads linears of a checkpoint whose config has a ``quantization_config``."""

    def __init__(self, config: dict[str, Any], tensors: Tensors) -> None:
        """
        Raises:
            ModelError: it is quantised in a way that the engine has no linear for.
        """
        self.method = config["quant_method"]
        self._config, self._tensors = config, tensors
        read = {"gptq": self._gptq, "awq": self._awq, "compressed-tensors": self._compressed, "modelopt": self._fp8}
        if (
            self.method not in read
            or self._bits() not in (4, 8)
            or self._bits() == 8
            and self.method in ("gptq", "awq")
        ):
            raise ModelError(
                f"the checkpoint is quantised ({self.method}, {self._bits()} bits), which is not supported; "
                f"supported are {_FORMS}; or take the unquantised one"
            )
        self._read = read[self.method]

    def linear(self, names: list[str]) -> Parts:
        """The form of the Hugging Face linears ``names``, stacked; ``weight`` alone where they are not quantised.

        Raises:
            ModelError: they cannot be one linear.
        """
        made = [self._one(name) for name in names]
        first = made[0]
        shared = {key for key in first if key in ("group", "order")}
        if any(parts.keys() != first.keys() or any(not parts[k].equal(first[k]) for k in shared) for parts in made):
            raise ModelError(
                f"{', '.join(names)} are quantised in different ways or column orders, and cannot be fused"
            )
        return {key: first[key] if key in shared else torch.cat([parts[key] for parts in made]) for key in first}

    def _one(self, name: str) -> Parts:
        plain = f"{name}.weight"
        if self._tensors.has(plain) and self._tensors.get(plain).dtype in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
        ):
            return {"weight": self._tensors.get(plain)}
        return self._read(name)

    def _bits(self) -> int:
        if self.method == "modelopt":
            algorithm = self._config.get("quant_algo", self._config.get("quantization", {}).get("quant_algo"))
            return 8 if algorithm == "FP8" else 0
        if self.method == "compressed-tensors":
            groups = list(self._config["config_groups"].values())
            return groups[0]["weights"]["num_bits"] if len(groups) == 1 else 0
        return self._config.get("bits", self._config.get("w_bit", 0))

    def _gptq(self, name: str) -> Parts:
        """qweight int32 ``[K / 8, N]``, qzeros int32 ``[groups, N / 8]``, scales ``[groups, N]``, g_idx ``[K]``."""
        get = self._tensors.get
        codes = _nibbles(get(f"{name}.qweight").T)
        zero = _nibbles(get(f"{name}.qzeros")).T
        if self._config.get("checkpoint_format", "gptq") == "gptq":
            zero = zero + 1 & 15  # the first version stored them one too small
        groups = get(f"{name}.g_idx").long() if self._tensors.has(f"{name}.g_idx") else None
        return _int4(codes, get(f"{name}.scales").T, zero, self._config["group_size"], groups)

    def _awq(self, name: str) -> Parts:
        """qweight int32 ``[K, N / 8]``, qzeros int32 ``[groups, N / 8]``, scales ``[groups, N]``."""
        get = self._tensors.get
        codes, zero = (_nibbles(get(f"{name}.{part}"), AWQ_ORDER).T.contiguous() for part in ("qweight", "qzeros"))
        size = self._config.get("group_size", self._config.get("q_group_size"))
        return _int4(codes, get(f"{name}.scales").T, zero, size, None)

    def _compressed(self, name: str) -> Parts:
        get, has = self._tensors.get, self._tensors.has
        [group] = self._config["config_groups"].values()
        kind = group.get("format") or self._config["format"]
        if kind == "float-quantized":
            return self._fp8(name)
        scale = get(f"{name}.weight_scale").float()
        if kind == "int-quantized":
            weight = get(f"{name}.weight")
            form = "w8a8" if group.get("input_activations") else "int8"
            return {form: weight, "scale": scale.flatten().expand(len(weight)).contiguous()}
        if kind != "pack-quantized" or self._bits() != 4:
            raise ModelError(f"compressed-tensors in form {kind} is not supported; supported are {_FORMS}")
        codes = _nibbles(get(f"{name}.weight_packed"))[:, : int(get(f"{name}.weight_shape")[1])]
        zero = torch.full(scale.shape, 8, dtype=torch.uint8)
        if has(f"{name}.weight_zero_point"):
            zero = _nibbles(get(f"{name}.weight_zero_point").T).T[: len(codes)]
        groups = get(f"{name}.weight_g_idx").long() if has(f"{name}.weight_g_idx") else None
        return _int4(codes, scale, zero, group["weights"].get("group_size") or -1, groups)

    def _fp8(self, name: str) -> Parts:
        weight = self._tensors.get(f"{name}.weight")
        scale = self._tensors.get(f"{name}.weight_scale").float().flatten()
        if len(scale) not in (1, len(weight)):
            raise ModelError(f"{name}: {len(scale)} FP8 scales for {len(weight)} rows; expected one, or one a row")
        return {"fp8": weight, "scale": scale.expand(len(weight)).contiguous()}


def _int4(codes: Tensor, scale: Tensor, zero: Tensor, size: int, groups: Tensor | None) -> Parts:
    """The form ``int4``; columns are sorted by their group where ``groups`` names it for each."""
    inputs = codes.shape[1]
    size = inputs if size == -1 else size
    made = {"scale": scale.float().contiguous(), "zero": zero.contiguous(), "group": torch.tensor(size).int()}
    if groups is not None and not groups.equal(torch.arange(inputs) // size):
        order = torch.argsort(groups, stable=True)
        if not groups[order].equal(torch.arange(inputs) // size):
            raise ModelError(f"g_idx does not put {size} columns into each group: the checkpoint is damaged")
        codes, made["order"] = codes[:, order], order.int()
    return made | {"int4": pack(codes)}


def _nibbles(packed: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 ``[rows, columns]`` → its 4-bit numbers, uint8 ``[rows, 8 * columns]``, the lowest first."""
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(order)] = torch.arange(0, 32, 4, dtype=torch.int32)
    return (packed[..., None] >> shifts & 15).to(torch.uint8).flatten(1)
