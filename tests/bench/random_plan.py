"""Plans of well-known shapes with random weights, for measuring: what the numbers are does not matter for speed.

All layers are one file under many names, so that a plan of 70B parameters takes the disk 5 GB and is made in seconds.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from batchinfer.engine.model.spec import DecoderSpec, RopeSpec
from batchinfer.engine.plan import EnginePlan, device_name
from batchinfer.engine.profile import Profile
from batchinfer.engine.quant import fp8


def _llama(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int = 128, **changes) -> DecoderSpec:
    common = dict(
        family="llama", vocab_size=128256, num_kv_heads=8, rms_norm_eps=1e-5, max_position=8192,
        rope=RopeSpec(theta=500000.0), tied_head=False,
    )  # fmt: skip
    return DecoderSpec(
        hidden_size=hidden, intermediate_size=intermediate, num_layers=layers, num_heads=heads, head_dim=head_dim,
        **common | changes,
    )  # fmt: skip


SHAPES = {
    "1b": _llama(2048, 8192, 16, 32, head_dim=64, tied_head=True),  # Llama 3.2
    "8b": _llama(4096, 14336, 32, 32),  # Llama 3.1
    "70b": _llama(8192, 28672, 80, 64),
    "tiny": _llama(256, 512, 4, 8, head_dim=32, vocab_size=32000),  # for trying a benchmark on a CPU
}


def make_plan(folder: Path, shape: str, mode: str, profile: Profile, device: str = "cuda") -> EnginePlan:
    """
    Args:
        mode: bf16, or fp8 for W8A8 with FP8 keys and values.
    """
    spec, quantised = SHAPES[shape], mode == "fp8"
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "weights").mkdir(exist_ok=True)
    words = {f"w{i}": i for i in range(spec.vocab_size)}
    Tokenizer(models.WordLevel(words, "w0")).save(str(folder / "tokenizer" / "tokenizer.json"))
    groups = {"embed": _embed(spec, device), "head": _head(spec, device), "layer-000": _layer(spec, quantised, device)}
    for name, group in groups.items():
        save_file({key: value.cpu() for key, value in group.items()}, folder / "weights" / f"{name}.safetensors")
    for layer in range(1, spec.num_layers):
        os.link(folder / "weights/layer-000.safetensors", folder / f"weights/layer-{layer:03d}.safetensors")
    plan = EnginePlan(
        path=folder,
        model=f"{shape}-{mode}",
        spec=spec,
        device=device,
        dtype="bfloat16",
        quantization="fp8" if quantised else "none",
        group_size=0,
        quality=None,
        profiles=(profile,),
        eos_token_ids=(2,),
        fingerprint={"device": device_name(device), "weights": f"random {shape} {mode}"},
        kv_dtype="fp8" if quantised else "auto",
    )
    plan.save()
    return plan


def _draw(rows: int, columns: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(rows + 7 * columns)
    return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16).mul_(columns**-0.5)


def _embed(spec: DecoderSpec, device: str) -> dict[str, torch.Tensor]:
    return {"weight": _draw(spec.vocab_size, spec.hidden_size, device)}


def _head(spec: DecoderSpec, device: str) -> dict[str, torch.Tensor]:
    norm = {"norm.weight": torch.ones(spec.hidden_size)}
    return norm if spec.tied_head else norm | {"weight": _draw(spec.vocab_size, spec.hidden_size, device)}


def _layer(spec: DecoderSpec, quantised: bool, device: str) -> dict[str, torch.Tensor]:
    hidden, attended = spec.hidden_size, spec.num_heads * spec.head_dim
    made = {f"{norm}.weight": torch.ones(hidden) for norm in ("attn_norm", "mlp_norm")}
    shapes = {
        "qkv": (spec.qkv_size, hidden),
        "o": (hidden, attended),
        "gate_up": (2 * spec.intermediate_size, hidden),
        "down": (hidden, spec.intermediate_size),
    }
    for name, shape in shapes.items():
        weight = _draw(*shape, device)
        form = fp8.quantize(weight) if quantised else {"weight": weight}
        made |= {f"{name}.{part}": tensor for part, tensor in form.items()}
    return made
