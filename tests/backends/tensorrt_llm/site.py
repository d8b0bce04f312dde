"""A place where tensorrt_llm is "installed" in some version, a model that it can load, jobs that use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from batchinfer.job import Job

ROOT = Path(__file__).parents[3]
FAKES = ROOT / "tests" / "fakes"
VERSIONS = ("1.0.0", "1.1.0", "1.2.1", "1.3.0rc20", "1.3.0rc21", "1.3.0rc25", "1.3.0rc27", "1.4.0rc1")
EOS, END_OF_TURN = "<eos>", "<turn>"


def install(folder: Path, version: str) -> Path:
    """A folder for sys.path."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in ("tensorrt_llm", "modelopt"):
        (folder / package).symlink_to(FAKES / package)
    info = folder / f"tensorrt_llm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n")
    return folder


def make_model(folder: Path, generation: dict[str, Any] | None = None) -> Path:
    """A Hugging Face folder: tokens are bytes, and two more that end a completion. Its weights mean nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken(END_OF_TURN, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 258,
        "max_position_embeddings": 512,
        "eos_token_id": [256, 257],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 257]} | (generation or {})))
    save_file({"w": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


def make_job(folder: Path, model: Path | str, **changes: Any) -> Job:
    """A job over ``folder``/in.parquet; ``changes`` are dotted keys with ``__`` for the dot."""
    settings: dict[str, Any] = {
        "input.path": str(folder / "in.parquet"),
        "prompt.template": "{{ text }}",
        "model.path": str(model),
        "engine.backend": "tensorrt-llm",
        "engine.profile.batch_size": 8,
        "sampling.max_tokens": 64,
        "output.path": str(folder / "out"),
        "checkpoint.unit_rows": 64,
        "checkpoint.sync_seconds": 0.02,
    }
    return Job.load(None, settings | {key.replace("__", "."): value for key, value in changes.items()}, {})


def command(
    site: Path, *arguments: str, faults: dict[str, Any] | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """The command line where ``site`` is installed."""
    return subprocess.run(
        [sys.executable, "-m", "batchinfer", *arguments],
        env=process_environ(site, faults) | environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def process_environ(site: Path, faults: dict[str, Any] | None = None) -> dict[str, str]:
    path = os.pathsep.join((str(site), str(ROOT)))
    return {**os.environ, "PYTHONPATH": path, "FAKE_TENSORRT_LLM": json.dumps(faults or {})}


def events(log: Path, kind: str) -> list[dict[str, Any]]:
    """What the fake noted."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]
