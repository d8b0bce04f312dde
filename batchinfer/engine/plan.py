"""EnginePlan: a built engine on disk. Made once by ``build``, loaded by every run after.

```
ENGINE/
  plan.json               spec, dtype, profiles, fingerprint, tactics
  weights/embed.safetensors  layer-000.safetensors …  head.safetensors
  tokenizer/              tokenizer.json and its relatives
```
"""

from __future__ import annotations

import contextlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import batchinfer
from batchinfer.cache import digest
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.profile import Profile, Shape, limits
from batchinfer.engine.tactics import Tactic, table
from batchinfer.errors import ModelError, StalePlanError
from batchinfer.host import cpu_flags

FORMAT = 6
_CPU_EXTRAS = {"avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "bf16", "i8mm", "sve"}


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
    kv_dtype: str = "auto"  # of keys and values in their pages: auto (as dtype) | fp8 | int8
    kept: tuple[str, ...] = ()  # matrices that quantising left in dtype, each as layer-003.down
    max_quality_loss: float = -1.0  # as it was asked for, so that building again asks for the same
    tactics: tuple[Tactic, ...] = ()  # what was timed; for anything else the engine takes what is likely to be fastest

    @classmethod
    def load(cls, path: str | Path) -> EnginePlan:
        """Read a plan folder.

        Raises:
            ModelError: it is no plan.
            StalePlanError: it was written by another format version, or belongs to another device.
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
            raise StalePlanError(
                f"the plan {path} has format {value.get('format')}, this version reads {FORMAT}: "
                "build it again, which `run --rebuild` does"
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
            kept=tuple(value["kept"]),
            max_quality_loss=value.get("max_quality_loss", -1.0),
            tactics=tuple(map(Tactic.from_dict, value["tactics"])),
        )
        plan._check_device()
        return plan

    def save(self) -> None:
        value = {"format": FORMAT} | asdict(self) | {"tactics": [tactic.as_dict() for tactic in self.tactics]}
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

    def explain(self) -> str:
        """What it was built for and with, and which kernels won, for people."""
        about = f"{self.model} in {self.dtype}, quantization {self.quantization}, plan {self.digest[:16]}"
        lines = [str(self.path), about, *self._told_of_kept(), *(f"for {profile}" for profile in self.profiles)]
        lines += [f"{name}: {value}" for name, value in self.fingerprint.items()]
        return "\n".join([*lines, "", table(self.tactics)])

    def _told_of_kept(self) -> list[str]:
        layers: dict[str, list[int]] = {}
        for name in self.kept:
            layer, _, linear = name.removeprefix("layer-").partition(".")
            layers.setdefault(linear, []).append(int(layer))
        return [f"{linear} in {self.dtype} in layers {', '.join(map(str, each))}" for linear, each in layers.items()]

    @property
    def digest(self) -> str:
        """Of all that a build decides: equal inputs give equal plans, but for what was timed."""
        return digest({name: value for name, value in asdict(self).items() if name not in ("path", "tactics")})

    def _check_device(self) -> None:
        here = device_name(self.device)
        if self.fingerprint["device"] != here:
            raise StalePlanError(
                f"the plan {self.path} was built for {self.fingerprint['device']}, this machine has {here}: "
                "build it again, which `run --rebuild` does"
            )


def device_name(device: str) -> str:
    """What a plan is bound to: the GPU and its capability, or the CPU's architecture and what kernels make use of."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    extras = sorted(_CPU_EXTRAS & cpu_flags())
    return " ".join(["CPU", platform.machine(), torch.backends.cpu.get_cpu_capability(), *extras])


def versions() -> dict[str, str]:
    """Of what computes: a plan was timed with these, and kernels of others may be faster or round differently."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda or "none", "triton": "none"}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    return found | {"batchinfer": batchinfer.__version__}


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
