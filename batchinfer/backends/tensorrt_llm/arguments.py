"""A job in the words of tensorrt_llm: arguments of ``LLM(...)`` and of ``SamplingParams(...)``, and what has no word.

Nothing is left to a default that decides tokens or memory: defaults differ between versions, and late ones fill what
is not given from the model's generation_config.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.backends.tensorrt_llm.make import SCHEMES
from batchinfer.backends.tensorrt_llm.versions import Release
from batchinfer.engine.model.source import DEFAULT_SEQ_LEN, ModelSource
from batchinfer.errors import JobError, ModelError
from batchinfer.job import EngineSection, Job, SamplingSection
from batchinfer.request import SamplingParams

# What the engine is given when the job does not say: sequences that run at once, tokens of a step. Every batch size
# up to the first costs a CUDA graph.
DEFAULT_BATCH_SIZE, DEFAULT_STEP_TOKENS = 256, 8192


@dataclass(frozen=True)
class Limits:
    """The optimisation profile, with every number known."""

    batch_size: int  # sequences that run at once
    step_tokens: int  # tokens of one step, prefill and decode together
    seq_len: int  # prompt plus completion tokens of one sequence

    @classmethod
    def of(cls, engine: EngineSection, source: ModelSource) -> Limits:
        """
        Raises:
            ModelError: the sequences asked for are longer than the model knows.
        """
        [profile], most = engine.profile, source.max_position()
        asked = cls(profile.batch_size.max, profile.step_tokens.max, profile.seq_len.max)
        if asked.seq_len > most:
            raise ModelError(
                f"engine.profile.seq_len {asked.seq_len} is more than the {most} positions that {source.name} knows"
            )
        batch_size = asked.batch_size or DEFAULT_BATCH_SIZE
        step_tokens = max(asked.step_tokens or DEFAULT_STEP_TOKENS, batch_size)
        return cls(batch_size, step_tokens, asked.seq_len or min(most, DEFAULT_SEQ_LEN))


def check(job: Job, release: Release | None) -> None:
    """
    Args:
        release: the version here; None where there is none, and what depends on it stays open.

    Raises:
        JobError: the job asks for what this version, or none at all, has.
    """
    for name, value in _ENGINE_ONLY.items():
        if getattr(job.build, name) == value and job.engine.tensorrt.flavour == "pytorch":
            raise JobError(f'build.{name} = "{value}" needs engine.tensorrt.flavour = "engine"')
    for key in _NATIVE_ONLY:
        section, name = key.split(".")
        asked = getattr(job, section)
        if getattr(asked, name) != type(asked).model_fields[name].default:
            raise JobError(f'{key} is not for engine.backend = "tensorrt-llm", which chooses by itself')
    if quantization(job) not in ("none", *SCHEMES):
        raise JobError(
            f'build.quantization = "{quantization(job)}" is the native engine\'s; engine.backend = "tensorrt-llm" has '
            f"{', '.join(SCHEMES)}"
        )
    if release is None:
        return
    if job.engine.tensorrt.flavour == "engine" and not release.has("engine flavour"):
        raise JobError(
            f'engine.tensorrt.flavour = "engine": {release} has no TensorRT engines any more, the last version was '
            '1.3.0rc20; use flavour = "pytorch"'
        )
    if _cpp_sampler(job, release):
        return
    for name in ("min_p", "repetition_penalty"):
        if _uses(job.sampling, name) and not release.has("torch sampler with min_p and penalties"):
            raise JobError(f"sampling.{name}: the sampler of {release} passes over it; leave it out")
    if "seed" in job.sampling.columns:
        raise JobError(
            f"sampling.columns.seed: the sampler of {release} draws for a batch together, so a row's own seed does not "
            "decide its tokens; leave the column out, or use a version before 1.3.0rc26"
        )


def quantization(job: Job) -> str:
    """The scheme that a build must apply, or ``none``."""
    return "none" if job.build.quantization == "auto" else job.build.quantization


def seeds_decide(job: Job, release: Release) -> bool:
    """Whether rows that are drawn at random come out the same in every run."""
    return _cpp_sampler(job, release) or not _uses(job.sampling, "temperature")


def llm_arguments(job: Job, release: Release, model: Path, limits: Limits) -> dict[str, Any]:
    """Keyword arguments that load ``model``: a checkpoint, or a compiled engine.

    Sections are plain dicts, which every version turns into its own classes, whatever those are called.
    """
    engine, own = job.engine, job.engine.tensorrt
    kv_cache: dict[str, Any] = {
        "enable_block_reuse": engine.prefix_sharing,
        "free_gpu_memory_fraction": own.kv_cache_fraction,
    }
    arguments: dict[str, Any] = {
        "model": str(model),
        "tensor_parallel_size": engine.tp,
        "pipeline_parallel_size": engine.pp,
        "dtype": engine.dtype,
        "max_batch_size": limits.batch_size,
        "max_num_tokens": limits.step_tokens,
        "max_seq_len": limits.seq_len,
        "enable_chunked_prefill": True,  # without, one prompt longer than a step is refused at submit
        "kv_cache_config": kv_cache,
        "scheduler_config": {"capacity_scheduler_policy": own.capacity_policy.upper()},
    }
    if own.guided_json is not None:
        arguments["guided_decoding_backend"] = own.guided_decoding_backend
    if own.flavour == "engine":
        return arguments  # an engine's dtypes and graphs were settled when it was built
    kv_cache["dtype"] = job.build.kv_dtype
    # Without padding only some batch sizes have a graph, and all between them run kernel by kernel.
    arguments["cuda_graph_config"] = {"enable_padding": True, "max_batch_size": limits.batch_size}
    cpp = _cpp_sampler(job, release)
    if release.has("use_torch_sampler"):
        arguments["use_torch_sampler"] = not cpp
    elif release.has("sampler_type"):
        arguments["sampler_type"] = "TRTLLMSampler" if cpp else "TorchSampler"
    return arguments


def sampling_arguments(params: SamplingParams, index: int, end_ids: tuple[int, ...]) -> dict[str, Any]:
    """Keyword arguments for the ``index``-th of a request's completions; ``n`` of them are ``n`` requests.

    ``end_id`` is left alone: only where it is None does tensorrt_llm tokenise the stop strings. It then knows one EOS
    of the several that models have, so all of them are given as stop tokens.

    The stop string is kept in what comes back, and the text is cut here: tensorrt_llm takes the tokens of a stop string
    away if they are spelled as its own tokenizer would, and leaves them if they are not.
    """
    stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *end_ids)
    arguments: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "n": 1,
        "seed": _seed(params.seed, index),
        "repetition_penalty": float(params.repetition_penalty),
        "ignore_eos": params.ignore_eos,
        "stop_token_ids": list(dict.fromkeys(stops)) or None,
        "stop": list(params.stop) or None,
        "include_stop_str_in_output": True,
        "detokenize": False,
        "add_special_tokens": False,
    }
    if params.temperature == 0:
        return arguments | {"top_k": 1}  # greedy by the rules of every version, whatever else is filled in
    drawn = {"temperature": float(params.temperature), "top_k": params.top_k, "top_p": float(params.top_p)}
    return arguments | drawn | ({"min_p": float(params.min_p)} if params.min_p else {})


def environment(job: Job, environ: Mapping[str, str], cache: Path, name: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Prefixes of variables to keep from the engine's process, and variables to set there; ``cache`` is made.

    What a batch system tells about its own MPI makes tensorrt_llm join that job instead of starting its own ranks;
    under ``trtllm-llmapi-launch`` it is meant to.
    """
    tactics = cache / "tensorrt_llm"
    tactics.mkdir(parents=True, exist_ok=True)
    launched = environ.get("TLLM_SPAWN_PROXY_PROCESS") == "1"
    own = {
        "TRTLLM_NO_USAGE_STATS": "1",
        "TLLM_AUTOTUNER_CACHE_PATH": str(tactics / "autotuner.json"),
        "HF_HUB_OFFLINE": "1",  # nothing is downloaded at run time
    }
    if job.engine.threads:
        own["OMP_NUM_THREADS"] = str(job.engine.threads)
    if job.engine.tp * job.engine.pp == 1:
        own["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"  # one rank needs no MPI at all
    elif not launched:
        own["PMIX_HOSTNAME"] = name  # Open MPI 5 cannot spawn ranks on a host with a long name
    return (() if launched else ("OMPI_", "PMIX_", "PMI_", "SLURM_")), own


def _uses(sampling: SamplingSection, name: str) -> bool:
    return name in sampling.columns or getattr(sampling, name) != _OFF[name]


_ENGINE_ONLY = {"quantization": "int8_sq", "kv_dtype": "int8"}
_NATIVE_ONLY = (
    *(f"engine.{name}" for name in ("pp_partition", "micro_batches", "mode", "prefill_tp", "prefill_pp")),
    "build.group_size",
    "build.max_quality_loss",
)
_OFF = {"temperature": 0.0, "min_p": 0.0, "repetition_penalty": 1.0}


def _cpp_sampler(job: Job, release: Release) -> bool:
    """Whether rows are sampled in C++. It honours seeds and everything else, where it is still there; the torch sampler
    is the faster one for greedy rows."""
    if job.engine.tensorrt.flavour == "engine":
        return True
    asked = any(_uses(job.sampling, name) for name in _OFF) or "seed" in job.sampling.columns
    return asked and release.has("C++ sampler")


def _seed(seed: int, index: int) -> int:
    """Never None, which would be a fixed 0 for every row; a whole number that fits a signed and an unsigned 64 bits."""
    if index:
        seed = int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little")
    return seed & (2**63 - 1)
