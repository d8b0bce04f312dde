"""The build, slow and once: convert a model into an EnginePlan. Runs, ever after, only load it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from batchinfer import pulse
from batchinfer.cache import cache_root, digest, make_folder
from batchinfer.engine import tactics
from batchinfer.engine.model.source import ModelSource, code_digest, file_digest
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.model.tokenizer import write_tokenizer
from batchinfer.engine.model.weights import convert, quantization_of
from batchinfer.engine.plan import FORMAT, EnginePlan, device_name, versions
from batchinfer.engine.profile import Asked, Profile, Sample, as_asked, asks_nothing, fit, in_order, limits
from batchinfer.engine.quant import Group, Quantizer, Scheme, find_scheme
from batchinfer.engine.quant.budget import within
from batchinfer.engine.quant.default import default_rows
from batchinfer.engine.text import Text
from batchinfer.errors import ModelError, StalePlanError
from batchinfer.flock import held_by_another

KV_MAX_LOSS = 0.01  # of perplexity that a build accepts of keys and values in 8 bits alone, unless told otherwise
NEAREST = "smoothquant"  # to a scheme that the device has to emulate
_CALIBRATION_TOKENS = 16384  # that quantising is calibrated and measured with: a minute or two of a small CPU


def build(
    model: str,
    output: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 0,
    step_tokens: int = 0,
    seq_len: int = 0,
    profiles: Sequence[Asked] = (),
    fit_to: Sample | None = None,
    quantization: str = "auto",
    kv_dtype: str = "auto",
    group_size: int = 0,
    max_quality_loss: float = -1.0,
    calibration: Iterable[Sequence[int]] = (),
    calibration_key: str = "",
    progress: bool = True,
) -> EnginePlan:
    """Build an engine for ``model``; into the cache when no ``output`` is given, where an equal build is found again.

    Args:
        model: a Hugging Face folder, a .gguf file or the name of an installed model.
        output: folder to make; it must not exist yet.
        device, dtype: "auto" takes a CUDA GPU if there is one, and bfloat16 where the device multiplies it fast.
        batch_size, step_tokens, seq_len: limits of the one profile, 0 for defaults.
        profiles: instead of those: several, each as [engine.profile] in a job.
        fit_to: lengths of a job's rows that a profile is made for, beside the widest of those asked for.
        quantization: a scheme of ``quant.SCHEMES``, or "auto" or "none" to leave the weights as they come.
        kv_dtype: of keys and values in their pages, "int8" (on CPUs), "fp8" (on GPUs) or "auto", which is ``dtype``.
        group_size: weights that share a scale where the scheme has groups, -1 for one scale a row, 0 for a default.
        max_quality_loss: of perplexity, as a fraction, that quantising may cost; below 0 the scheme's own limit. Where
            it costs more, the matrices that cost most stay as they are, up to half of the weights.
        calibration: rows of token ids that quantising is calibrated and measured with, read if they are needed;
            a text that comes along where there are none.
        calibration_key: names those rows for the cache.

    Raises:
        ModelError: the model cannot be used, the limits contradict it, ``output`` exists, or quantising lost more
            than it may. Nothing half-made stays.
    """
    source = ModelSource.resolve(model)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    profiles = profiles or [{"batch_size": batch_size, "step_tokens": step_tokens, "seq_len": seq_len}]
    scheme = find_scheme(quantization)
    come = quantization_of(source)
    if come and quantization != "auto":
        raise ModelError(
            f'{source.name} is quantised already ({come["quant_method"]}): build.quantization must be "auto", '
            f"got {quantization!r}; or take the unquantised model"
        )
    check_kv_dtype(kv_dtype, device)
    if come and kv_dtype == "int8":
        raise ModelError(
            f'build.kv_dtype = "int8" scales matrices before they are quantised, and those of {source.name} are '
            f'quantised already ({come["quant_method"]}): use "auto", or take the unquantised model'
        )
    quantises = scheme is not None or kv_dtype != "auto" and not come
    if output is None:
        asked = [device_name(device), dtype, profiles, fit_to and asdict(fit_to), kv_dtype]
        if quantises:
            asked += [quantization, group_size, max_quality_loss, calibration_key]
        key = digest([source.stat_digest(), code_digest(), tactics.kernels_digest(), FORMAT, asked])
        target = cache_root() / "engines" / f"{source.name.lower()}-{key[:16]}"
        if target.is_dir():
            return EnginePlan.load(target)
    else:
        target = Path(output).expanduser().resolve()
        if target.exists():
            raise ModelError(f"{target} exists already: build into a new folder, or remove it first")
    spec, eos_token_ids = _read_config(source)
    made = in_order(Profile.of(asked, device, spec.max_position) for asked in profiles)
    if fit_to is not None:
        made = fit(made[-1], fit_to)
    if progress:
        print(f"batchinfer: building the engine of {source.name}, once, into {target}", file=sys.stderr, flush=True)
        for profile in made:
            print(f"batchinfer: for {profile}", file=sys.stderr, flush=True)
        if scheme is not None and not scheme.native(torch.device(device)):
            here = f"{device_name(device)} does not multiply {scheme.name}: emulated, the same numbers but slow"
            print(f"batchinfer: {here}; {NEAREST} is as small, and fast", file=sys.stderr, flush=True)

    def fill(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        write_tokenizer(source, folder / "tokenizer")
        (folder / "weights").mkdir()
        held = getattr(torch, dtype)

        def write(groups: Iterable[tuple[str, Group]], doing: str = "building", keep: bool = True) -> None:
            shown = progress and sys.stderr.isatty()
            bar = tqdm(groups, f"{doing} {source.name}", spec.num_layers + 2, disable=not shown, leave=False)
            for name, group in bar:
                if keep:
                    save_file(group, folder / "weights" / f"{name}.safetensors")
                pulse.beat()

        def quantised(kept: Sequence[str] = (), trying: bool = False) -> Quantizer:
            on = torch.device(device)
            quantizer = Quantizer(scheme, group_size, spec, held, on, rows, kv_dtype, kept, trying)
            if progress and trying:
                print("batchinfer: too much: trying what each matrix costs", file=sys.stderr, flush=True)
            groups = quantizer(convert(source, spec, held, torch.float32))
            write(groups, "trying each matrix of" if trying else "quantising", keep=not trying)
            if progress and not trying:
                print(f"batchinfer: {quantizer}: {quantizer.quality}", file=sys.stderr, flush=True)
            return quantizer

        quantizer = None
        if quantises:
            rows = _calibration_rows(calibration, limits(made).seq_len)
            rows = rows or default_rows(Text(folder / "tokenizer"), _CALIBRATION_TOKENS)
            most = _most_loss(scheme, max_quality_loss)
            quantizer = within(most, quantised)
            _judge(quantizer, most)
        else:
            write(convert(source, spec, held))
        quality = quantizer and quantizer.quality
        plan = EnginePlan(
            path=folder,
            model=source.name,
            spec=spec,
            device=device,
            dtype=dtype,
            quantization=scheme.name if scheme else come["quant_method"] if come else "none",
            group_size=quantizer.group_size if scheme and scheme.grouped else 0,
            quality=quality and asdict(quality),
            profiles=made,
            eos_token_ids=eos_token_ids,
            fingerprint={
                "weights": source.weights_digest(),
                "tensors": file_digest(sorted((folder / "weights").iterdir())),
                "tokenizer": file_digest(sorted((folder / "tokenizer").iterdir())),
                "device": device_name(device),
                **versions(),
            },
            kv_dtype=kv_dtype,
            kept=quantizer.kept if quantizer else (),
            max_quality_loss=max_quality_loss,
        )
        replace(plan, tactics=tactics.choose(plan)).save()

    try:
        make_folder(target, fill)
    except OSError as error:
        raise ModelError(f"cannot write the engine plan {target}: {error}") from None
    return EnginePlan.load(target)


def rebuild(model: str, folder: str | Path, **options: Any) -> EnginePlan:
    """Build the plan in ``folder`` again from ``model``: for this device, and else as it was but for what is asked.

    The old plan stays until the new one takes its place. Of several processes that ask, one builds, and the others wait
    and take what it built.

    Raises:
        ModelError: as ``build``.
    """
    folder = Path(folder).expanduser().resolve()
    with _alone_with(folder):
        with contextlib.suppress(StalePlanError):
            return EnginePlan.load(folder)  # another process was faster
        _build_anew(model, folder, options)
    return EnginePlan.load(folder)


def _build_anew(model: str, folder: Path, options: dict[str, Any]) -> None:
    was = json.loads((folder / "plan.json").read_text("utf-8"))
    kept = {name: was[name] for name in ("dtype", "group_size", "kv_dtype", "max_quality_loss") if name in was}
    if was.get("quality"):  # else its model came quantised, and comes so again
        kept["quantization"] = was["quantization"]
    if "profiles" in was:
        kept["profiles"] = [as_asked(Profile.from_dict(profile)) for profile in was["profiles"]]
    nothing = dict.fromkeys(kept, ("auto", 0)) | {"max_quality_loss": (-1.0,)}
    asked = {name: value for name, value in options.items() if name not in kept or value not in nothing[name]}
    if all(map(asks_nothing, asked.get("profiles", ()))):
        asked.pop("profiles", None)
    fresh, old = (folder.with_name(f".{folder.name}.{what}-{platform.node()}") for what in ("fresh", "old"))
    for left in (fresh, old):  # by one on this machine that was killed: here is nobody else
        shutil.rmtree(left, ignore_errors=True)
    build(model, fresh, **kept | asked)
    folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old)


@contextlib.contextmanager
def _alone_with(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with that folder. Where a file system knows no locks, nobody waits."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        while held_by_another(descriptor):
            pulse.beat()
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _calibration_rows(calibration: Iterable[Sequence[int]], longest: int) -> list[Sequence[int]]:
    """Evenly spread ones of ``calibration``, about _CALIBRATION_TOKENS together; none where one is all there is."""
    rows = [row[:longest] for row in calibration if len(row) > 1]
    stride = -(-sum(map(len, rows)) // _CALIBRATION_TOKENS)
    return rows[:: max(1, min(stride, len(rows) // 2))] if len(rows) > 1 else []  # one is to be held out


def _most_loss(scheme: Scheme | None, asked: float) -> float:
    """Of perplexity, that a build accepts."""
    if asked >= 0:
        return asked
    return KV_MAX_LOSS if scheme is None else scheme.max_loss


def _judge(quantizer: Quantizer, most: float) -> None:
    if not quantizer.quality.loss <= most:
        tried = ", which keeping up to half of the weights as they are does not mend" if quantizer.kept else ""
        raise ModelError(
            f"quantising to {quantizer} loses too much: {quantizer.quality}; build.max_quality_loss is {most:.1%}"
            f"{tried}. Raise it, lower build.group_size, calibrate with the job's own rows, or take another scheme"
        )


def choose_device(device: str) -> str:
    """
    Raises:
        ModelError: there is no such device, here or at all.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"engine.device must be auto, cpu, cuda, got {device!r}")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError('engine.device = "cuda", but torch finds no CUDA device; use "cpu" or "auto"')
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """bfloat16 where it is the device's fast path: any GPU of these years, a CPU with AVX512-BF16 or AMX.

    Raises:
        ModelError: the engine does not compute in ``dtype``.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ModelError(f"engine.dtype must be auto, float32 or bfloat16, got {dtype!r}")
    if dtype != "auto":
        return dtype
    fast = device == "cuda" or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "bfloat16" if fast else "float32"


def check_kv_dtype(kv_dtype: str, device: str) -> None:
    """
    Raises:
        ModelError: pages of ``device`` do not hold such keys and values.
    """
    known = {"cpu": "int8", "cuda": "fp8"}
    if kv_dtype not in ("auto", *known.values()):
        raise ModelError(f"build.kv_dtype must be auto, {' or '.join(sorted(known.values()))}, got {kv_dtype!r}")
    if kv_dtype not in ("auto", known[device]):
        raise ModelError(
            f'build.kv_dtype = "{kv_dtype}" is not for {device} devices: use "{known[device]}", which is as small, or '
            '"auto"'
        )


def _read_config(source: ModelSource) -> tuple[DecoderSpec, tuple[int, ...]]:
    """What the model is, and the tokens that end its sequences."""
    try:
        config = source.config()
        spec = DecoderSpec.from_config(config)
    except KeyError as error:
        raise ModelError(f"the config of {source.name} in {source.folder} has no {error}") from None
    eos = config.get("eos_token_id")
    return spec, () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
