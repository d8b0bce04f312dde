"""EnginePlan: a built engine on disk. Made once by ``build``, loaded by every run after.

```
ENGINE/
  plan.json               spec, dtype, profiles, fingerprint
  weights/embed.safetensors  layer-000.safetensors …  head.safetensors
  tokenizer/              tokenizer.json and its relatives
```
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from batchinfer.cache import digest
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.profile import Profile, Shape, limits
from batchinfer.errors import ModelError

FORMAT = 4


@dataclass(frozen=True)
class EnginePlan:
    path: Path
    model: str  # a name for people
    spec: DecoderSpec
    device: str  # cpu | cuda
    dtype: str  # float32 | bfloat16
    quantization: str
    group_size: int  # weights that share a scale, -1 all of a row; 0 where the scheme has no groups
    quality: dict[str, float] | None  # what quantising did, see quant.quality; None where nothing was quantised
    profiles: tuple[Profile, ...]  # narrow ones first
    eos_token_ids: tuple[int, ...]
    fingerprint: dict[str, str]  # source weights, tensors as built and tokenizer digests, device, versions
    kv_dtype: str = "auto"  # of keys and values in their pages: auto (as dtype) | fp8

    @classmethod
    def load(cls, path: str | Path) -> EnginePlan:
        """Read a plan folder.

        Raises:
            ModelError: it is no plan, was written by another format version, or belongs to another device.
        """
        path = Path(path).expanduser().resolve()
        try:
            value = json.loads((path / "plan.json").read_text("utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{path} is no engine plan: no plan.json in it; make one with `batchinfer build`"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path / 'plan.json'}: {error}") from None
        if value.get("format") != FORMAT:
            raise ModelError(
                f"{path} has plan format {value.get('format')}, this version reads {FORMAT}: build it again"
            )
        plan = cls(
            path=path,
            model=value["model"],
            spec=DecoderSpec.from_dict(value["spec"]),
            device=value["device"],
            dtype=value["dtype"],
            quantization=value["quantization"],
            group_size=value["group_size"],
            quality=value["quality"],
            profiles=tuple(map(Profile.from_dict, value["profiles"])),
            eos_token_ids=tuple(value["eos_token_ids"]),
            fingerprint=value["fingerprint"],
            kv_dtype=value["kv_dtype"],
        )
        plan._check_device()
        return plan

    def save(self) -> None:
        value = {"format": FORMAT} | asdict(self)
        del value["path"]
        (self.path / "plan.json").write_text(json.dumps(value, indent=1), "utf-8")

    def weights(self, group: str) -> dict[str, torch.Tensor]:
        """Tensors of one group (``embed``, ``layer-000`` …, ``head``), memory-mapped."""
        file = self.path / "weights" / f"{group}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {file}: {error}; build the plan again") from None

    @property
    def limits(self) -> Shape:
        """What some profile allows, each for itself."""
        return limits(self.profiles)

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def _check_device(self) -> None:
        here = device_name(self.device)
        if self.fingerprint["device"] != here:
            raise ModelError(
                f"the plan {self.path} was built for {self.fingerprint['device']}, this machine has {here}: "
                "build it again"
            )


def device_name(device: str) -> str:
    """What a plan is bound to: the GPU and its capability, or the CPU's architecture and vector width.

    Raises:
        ModelError: CUDA is asked for and there is none.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def describe(plan: EnginePlan) -> dict[str, Any]:
    """The part of a plan that decides tokens: a resumed run must find it unchanged."""
    return {
        "engine": "native",
        "decoder": digest(plan.spec.to_dict()),
        "eos_token_ids": list(plan.eos_token_ids),
        "weights": plan.fingerprint["tensors"],
        "tokenizer": plan.fingerprint["tokenizer"],
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "kv_dtype": plan.kv_dtype,
    }
