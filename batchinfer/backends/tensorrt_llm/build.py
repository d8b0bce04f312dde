"""The build: quantise a model with Model-Optimizer, or compile it with TensorRT, once; runs only load what came out.

A job whose model is loaded as it is needs none, and ``run`` makes its plan by the way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import batchinfer
from batchinfer.backends.tensorrt_llm.arguments import Limits, check, environment, llm_arguments, quantization
from batchinfer.backends.tensorrt_llm.plan import (
    FORMAT,
    TensorRTPlan,
    explain,
    model_folder,
    weights_digest,
)
from batchinfer.backends.tensorrt_llm.versions import Release, needed
from batchinfer.cache import cache_root, digest, make_folder
from batchinfer.engine.model.source import ModelSource, file_digest
from batchinfer.engine.model.tokenizer import write_tokenizer
from batchinfer.errors import ModelError
from batchinfer.job import Job


def build(
    job: Job,
    output: str | Path | None = None,
    prompts: Iterable[list[int]] = (),
    progress: bool = True,
    warm: bool = True,
) -> TensorRTPlan:
    """Make the plan that a job runs with; into the cache when no ``output`` is given, where ``run`` finds it.

    Args:
        prompts: token ids to calibrate with, read if the job's quantisation needs any.
        warm: load a checkpoint once, which shows that it fits and keeps the tactics that are chosen on the way.

    Raises:
        JobError: the job asks for what the installed version does not have.
        ModelError: the model cannot be used, a tool failed, or ``output`` exists. Nothing half-made stays.
    """
    release = needed()
    check(job, release)
    source, gpu = model_folder(job.model.path), _bound_to(job)
    limits, config = Limits.of(job.engine, source), source.config()
    eos = config.get("eos_token_id")
    if output is None:
        target = _cached(job, source, limits, gpu, release)
        if target.is_dir():
            return TensorRTPlan.load(target)
    else:
        target = Path(output).expanduser().resolve()
        if target.exists():
            raise ModelError(f"{target} exists already: build into a new folder, or remove it first")
    if progress:
        print(f"batchinfer: building the engine of {source.name}, once, into {target}", file=sys.stderr, flush=True)

    def fill(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        write_tokenizer(source, folder / "tokenizer")
        calibration = ""
        if _needs_tools(job):
            if "auto_map" in config:
                raise ModelError(f"{source.name} brings its own code (auto_map in config.json), which is never run")
            calibration = _make(job, source, limits, folder, prompts, release)
        own = job.engine.tensorrt
        if warm and own.flavour == "pytorch":
            made = folder / "checkpoint"
            checkpoint = made if made.is_dir() else source.folder
            _run(
                {"step": "warm up", "arguments": llm_arguments(job, release, checkpoint, limits)}, folder, job, release
            )
        TensorRTPlan(
            path=folder,
            model=str(source.folder),
            flavour=own.flavour,
            quantization=quantization(job),
            kv_dtype=job.build.kv_dtype,
            tp=job.engine.tp,
            pp=job.engine.pp,
            profile=limits,
            vocab_size=config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 1 << 31,
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            fingerprint={
                "weights": weights_digest(source),
                "tokenizer": file_digest(sorted((folder / "tokenizer").iterdir())),
                "calibration": calibration,
                "gpu": gpu,
                "tensorrt_llm": str(release),
                "batchinfer": batchinfer.__version__,
            },
        ).save()

    return TensorRTPlan.load(make_folder(target, fill))


def prepared(job: Job, release: Release) -> TensorRTPlan:
    """The plan that a run loads: the one that it names, the one in the cache, or one for the model as it is.

    Raises:
        ModelError: the plan does not belong here, or must be built first.
    """
    if job.engine.plan is not None:
        plan = TensorRTPlan.load(job.engine.plan)
        plan.check(job, release, _bound_to(job))
        return plan
    if _needs_tools(job):
        source = model_folder(job.model.path)
        if not _cached(job, source, Limits.of(job.engine, source), _bound_to(job), release).is_dir():
            raise ModelError("this engine is not built yet: run `batchinfer build` with the job first")
    return build(job, progress=False, warm=False)


def fingerprint(job: Job, plan: TensorRTPlan, release: Release) -> dict[str, Any]:
    """What decides tokens: a resumed run must find it unchanged."""
    own = job.engine.tensorrt
    return {
        "engine": "tensorrt-llm",
        "tensorrt_llm": release.series,
        "flavour": plan.flavour,
        "weights": plan.fingerprint["weights"],
        "tokenizer": plan.fingerprint["tokenizer"],
        "dtype": job.engine.dtype,
        "quantization": plan.quantization,
        "calibration": plan.fingerprint["calibration"],
        "kv_dtype": job.build.kv_dtype,
        "guided_json": own.guided_json and digest(json.loads(own.guided_json)),
    }


def gpu_name() -> str:
    """The GPU and its capability."""
    from batchinfer.engine.plan import device_name

    return device_name("cuda")


def _bound_to(job: Job) -> str:
    """The GPU, where the plan is for that alone: compiled engines are, checkpoints load on any."""
    return gpu_name() if job.engine.tensorrt.flavour == "engine" else "any"


def _needs_tools(job: Job) -> bool:
    return job.engine.tensorrt.flavour == "engine" or quantization(job) != "none"


def _cached(job: Job, source: ModelSource, limits: Limits, gpu: str, release: Release) -> Path:
    own = job.engine.tensorrt
    asked: list[Any] = [own.flavour, quantization(job), limits.batch_size, limits.step_tokens, limits.seq_len]
    if quantization(job) != "none":
        asked.append(job.build.calibration_rows)
    if own.flavour == "engine":
        asked += [job.build.kv_dtype, job.engine.tp, job.engine.pp, job.engine.dtype, gpu, str(release)]
    key = digest([source.stat_digest(), FORMAT, asked])
    return cache_root() / "engines" / f"{source.name.lower()}-tensorrt-{key[:16]}"


def _make(
    job: Job, source: ModelSource, limits: Limits, folder: Path, prompts: Iterable[list[int]], release: Release
) -> str:
    """Run NVIDIA's tools in a process of their own, which leave ``folder/checkpoint``.

    Returns: a digest of what they calibrated with.
    """
    own = job.engine.tensorrt
    calibration, calibrated = folder / "calibration", ""
    calibration.mkdir()
    if quantization(job) != "none":
        lines = calibration / "train.jsonl"
        if not _write_calibration(lines, prompts, folder / "tokenizer"):
            raise ModelError("a build that quantises calibrates with prompts of the job, and there is none: name a job")
        calibrated = file_digest([lines])
    spec = {
        "step": "compile" if own.flavour == "engine" else "quantise",
        "quantization": quantization(job),
        "kv_dtype": job.build.kv_dtype,
        "model": str(source.folder),
        "output": str(folder / "checkpoint"),
        "calibration": str(calibration),
        "calibration_rows": job.build.calibration_rows,
        "dtype": job.engine.dtype,
        "tp": job.engine.tp,
        "pp": job.engine.pp,
        "batch_size": limits.batch_size,
        "step_tokens": limits.step_tokens,
        "seq_len": limits.seq_len,
    }
    _run(spec, folder, job, release)
    if not (folder / "checkpoint" / "config.json").is_file():
        raise ModelError(f"{release} left no checkpoint: expected config.json in {folder / 'checkpoint'}")
    shutil.rmtree(calibration)  # users' texts
    return calibrated


def _write_calibration(file: Path, prompts: Iterable[list[int]], tokenizer_dir: Path) -> int:
    """Prompts as lines of text and ids: one tool reads the text, the other the ids. Returns how many there are."""
    from batchinfer.engine.text import Text

    text, count = Text(tokenizer_dir), 0
    with file.open("w", encoding="utf-8") as lines:
        for ids in prompts:
            lines.write(json.dumps({"text": text.decode(ids), "ids": list(ids)}) + "\n")
            count += 1
    return count


def _run(spec: dict[str, Any], folder: Path, job: Job, release: Release) -> None:
    """One step of make.py.

    Raises:
        ModelError: it failed; what it said last is told in a line.
    """
    file = folder / "make.json"
    file.write_text(json.dumps(spec))
    scrub, own = environment(job, os.environ, cache_root(), f"b{os.getpid()}")
    with subprocess.Popen(
        [sys.executable, "-m", "batchinfer.backends.tensorrt_llm.make", str(file)],
        env={name: value for name, value in os.environ.items() if not name.startswith(scrub)} | own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        said: list[str] = []
        try:
            for line in process.stdout or ():
                sys.stderr.write(line)
                said = [*said[-39:], line.rstrip()]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        ended = f"exit code {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
        last = next((line for line in reversed(said) if line.strip()), "it said nothing")
        raise ModelError(explain("\n".join(said), release) or f"the build ended with {ended}: {last}")
    file.unlink()
