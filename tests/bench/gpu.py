"""The native engine on one NVIDIA GPU, beside vLLM where that is importable, and beside what the card could do.

``python -m tests.bench.gpu [--models 8b 1b] [--modes fp8 bf16] [--workloads chat extract uniform] [--seconds 540]``

Weights are random and seeded, in the shapes of Llama 3.1 8B and Llama 3.2 1B, from a plan on disk; ``fp8`` is W8A8 with
FP8 keys and values. Output is greedy, of fixed lengths. The floor of a workload is the time of its matrix products at
the rate measured here plus that of reading its keys and values at the rate of a copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from batchinfer.engine.engine import Engine
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.profile import Profile
from batchinfer.request import Request, SamplingParams
from tests.bench.random_plan import SHAPES, make_plan
from tests.bench.workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Ceilings:
    """What this card does: bytes a second, read and written; operations a second of large products."""

    copy: float
    bf16: float
    fp8: float

    @classmethod
    def measure(cls) -> Ceilings:
        x = torch.empty(2**31, dtype=torch.uint8, device="cuda")
        y = torch.empty_like(x)
        copy = 2 * x.numel() / _seconds(lambda: y.copy_(x))
        m, n, k = 1024, 28672, 4096
        a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        bf16 = 2 * m * n * k / _seconds(lambda: a @ b.T)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        rows, columns = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
        fp8 = (
            2
            * m
            * n
            * k
            / _seconds(lambda: torch._scaled_mm(a8, b8.T, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True))
        )
        return cls(copy, bf16, fp8)

    def floor(self, spec: DecoderSpec, mode: str, workload: Workload, cached: int) -> float:
        """Seconds that a workload takes at the least, with ``cached`` prompt tokens not computed."""
        layer = spec.hidden_size * (spec.qkv_size + spec.num_heads * spec.head_dim + 3 * spec.intermediate_size)
        outputs = sum(output for _, output in workload)
        tokens = sum(len(prompt) for prompt, _ in workload) - cached + outputs
        products = 2 * tokens * layer * spec.num_layers / (self.fp8 if mode == "fp8" else self.bf16)
        products += 2 * outputs * spec.hidden_size * spec.vocab_size / self.bf16
        read = sum(output * (len(prompt) + output / 2) for prompt, output in workload)
        width = 1 if mode == "fp8" else 2
        return products + read * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width / self.copy


def _seconds(work) -> float:
    from triton.testing import do_bench

    return do_bench(work, warmup=50, rep=200, return_mode="median") / 1e3


def open_engine(model: str, mode: str, batch: int, folder: Path) -> Engine:
    make_plan(folder, model, mode, Profile(batch, 8192, 4096))
    torch.cuda.empty_cache()
    started = time.perf_counter()
    engine = Engine(folder)
    torch.cuda.synchronize()
    print(f"# {model} {mode}: opened in {time.perf_counter() - started:.1f} s, {engine.stage.num_pages} pages of "
          f"{engine.stage.page_size}, {torch.cuda.memory_allocated() / 2**30:.1f} GiB", flush=True)  # fmt: skip
    return engine


def run(engine: Engine, workload: Workload) -> tuple[float, int]:
    """Seconds, and prompt tokens found computed."""
    requests = [
        Request(i, prompt, SamplingParams(max_tokens=output, ignore_eos=True))
        for i, (prompt, output) in enumerate(workload)
    ]
    engine.pages.forget_idle()
    before = engine.counters.copy()
    started = time.perf_counter()
    made = sum(len(completion.outputs[0].token_ids) for completion in engine.generate(requests))
    seconds = time.perf_counter() - started
    assert made == sum(output for _, output in workload)
    counted = engine.counters.minus(before)
    print(
        f"#   {counted.steps} steps, schedule {counted.schedule_seconds:.2f} s, launch and wait "
        f"{counted.compute_seconds:.2f} s, collect {counted.collect_seconds:.2f} s, "
        f"{engine.scheduler.preemptions} preemptions so far",
        flush=True,
    )
    return seconds, counted.cached_tokens


def ours(model: str, mode: str, names: list[str], batch: int, ceilings: Ceilings) -> dict[str, tuple[float, float]]:
    """Output tokens a second and share of the floor, by workload."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(model, mode, batch, Path(folder))
        run(engine, WORKLOADS["chat"]()[:64])  # whatever is compiled on first use
        for name in names:
            workload = WORKLOADS[name]()
            seconds, cached = run(engine, workload)
            made = sum(output for _, output in workload)
            results[name] = made / seconds, ceilings.floor(engine.plan.spec, mode, workload, cached) / seconds
            print(f"ours {model} {mode} {name}: {seconds:.2f} s, {made / seconds:.0f} output tok/s, "
                  f"{results[name][1]:.0%} of the floor", flush=True)  # fmt: skip
    return results


def vllm(
    model: str, mode: str, names: list[str], seconds: float, tp: int = 1, pp: int = 1, requests: int = 0
) -> dict[str, float]:
    """Output tokens a second by workload, of those that it finished within ``seconds``; each is printed at once."""
    if importlib.util.find_spec("vllm") is None or seconds <= 0:
        return {}
    command = [sys.executable, "-m", "tests.bench.gpu_vllm", model, mode, *names]
    command += ["--tp", str(tp), "--pp", str(pp), "--requests", str(requests)]
    results = {}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        watch = threading.Timer(seconds, process.terminate)
        watch.start()
        for line in process.stdout:
            if line.startswith("{"):
                results |= json.loads(line)
                print(f"vllm {model} {mode}: {line.strip()}", flush=True)
        watch.cancel()
        if process.wait():
            said.seek(0)
            print(f"vllm {model} {mode} ended with {process.returncode}: {said.read()[-1500:]}", flush=True)
    return results


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--models", nargs="+", default=["8b", "1b"], choices=SHAPES)
    options.add_argument("--modes", nargs="+", default=["fp8", "bf16"], choices=["fp8", "bf16"])
    options.add_argument("--workloads", nargs="+", default=["chat", "extract", "uniform"], choices=WORKLOADS)
    options.add_argument("--batch", type=int, default=2048)
    options.add_argument("--seconds", type=float, default=560, help="that all of it may take")
    options = options.parse_args()
    started = time.monotonic()
    ceilings = Ceilings.measure()
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: copy {ceilings.copy / 1e12:.2f} TB/s, products "
          f"{ceilings.bf16 / 1e12:.0f} bf16 and {ceilings.fp8 / 1e12:.0f} FP8 TFLOP/s", flush=True)  # fmt: skip
    spawn = multiprocessing.get_context("spawn")  # an engine a process: the next one finds an empty card
    lines = []
    for model in options.models:
        for mode in options.modes:
            if time.monotonic() - started > options.seconds - 60:
                print(f"no time left for {model} {mode}")
                continue
            with ProcessPoolExecutor(1, spawn) as process:
                mine = process.submit(ours, model, mode, options.workloads, options.batch, ceilings).result()
            theirs = vllm(model, mode, options.workloads, options.seconds - (time.monotonic() - started))
            for name, (rate, share) in mine.items():
                peer = f"{theirs[name]:8.0f} {rate / theirs[name]:6.2f}x" if name in theirs else f"{'–':>8} {'–':>7}"
                lines.append(f"{model:5} {mode:5} {name:10} {rate:8.0f} {share:7.0%} {peer}")
    print(f"\n{'model':5} {'mode':5} {'workload':10} {'tok/s':>8} {'floor':>7} {'vLLM':>8} {'ratio':>7}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
