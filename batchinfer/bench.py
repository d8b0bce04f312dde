"""Benchmarks that anyone can run: the engine alone, and the pipeline around it with no engine at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchinfer.request import Request, SamplingParams

if TYPE_CHECKING:
    from batchinfer.engine.engine import Engine

_SECONDS = 0.1  # for the best of each rate
VOCABULARY = 32_000  # ids are drawn below this: lengths matter, the tokens do not


def workload(requests: int = 256, seed: int = 7, *, vocabulary: int = VOCABULARY) -> list[Request]:
    """Chat-like lengths for a small machine: prompts 16–512 tokens, median 96; outputs 8–256, median 64; no EOS."""
    rng = np.random.default_rng(seed)

    def lengths(median: int, sigma: float, low: int, high: int) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(median), sigma, requests).astype(int), low, high)

    prompts, outputs = lengths(96, 0.9, 16, 512), lengths(64, 0.6, 8, 256)
    return [
        Request(
            i, rng.integers(10, vocabulary, prompt).tolist(), SamplingParams(max_tokens=int(output), ignore_eos=True)
        )
        for i, (prompt, output) in enumerate(zip(prompts, outputs))
    ]


def engine(
    model: str = "smollm2-135m-instruct", requests: int = 256, repeats: int = 3, **engine_options: Any
) -> dict[str, Any]:
    """Generate ``workload`` with the native engine, ``repeats`` times; figures are those of the median run.

    Tokens a second count prompt and output. ``roofline_share`` is the time that this model's matrix products take here
    on their own, at their best, plus the time to read the decoded rows' keys and values once, over the time taken.
    """
    from batchinfer.engine.engine import Engine

    begun = time.perf_counter()
    opened = Engine(model, **engine_options)
    open_seconds = time.perf_counter() - begun
    spec = opened.plan.spec
    jobs = workload(requests, vocabulary=min(VOCABULARY, spec.vocab_size))
    list(opened.generate(jobs[: min(8, requests)]))  # warm-up: first touch, kernel selection
    runs = sorted((timed_run(opened, jobs) for _ in range(repeats)), key=lambda run: run["seconds"])
    run = runs[len(runs) // 2]
    peak = peak_rss_mb()  # before the floor is measured, which takes memory of its own
    ranks = opened.stage.details()
    floor = 0.0 if ranks else floor_seconds(opened, jobs)
    opened.close()
    return {
        "bench": "engine",
        "model": opened.plan.model,
        "device": opened.plan.fingerprint["device"],
        "dtype": opened.plan.dtype,
        "kernels": opened.stage.kernels_name,
        "batch_size": opened.plan.limits.batch_size,
        "step_tokens": opened.plan.limits.step_tokens,
        "requests": requests,
        **{key: round(value, 3) for key, value in run.items()},
        "total_tok_s_min_max": [round(runs[-1]["total_tok_s"], 1), round(runs[0]["total_tok_s"], 1)],
        "open_seconds": round(open_seconds, 2),
        "peak_rss_mb": peak,
        "floor_seconds": round(floor, 3),
        "roofline_share": round(floor / run["seconds"], 3),
        **ranks,
    }


def timed_run(opened: Engine, jobs: list[Request]) -> dict[str, float]:
    """Figures of one run of ``jobs``, all of which must come to their end; nothing of an earlier run is found again."""
    before = opened.counters.copy()
    preemptions = opened.scheduler.preemptions
    opened.pages.forget_idle()  # what an earlier run left would be found, and not computed
    begun = time.perf_counter()
    done = list(opened.generate(jobs))
    seconds = time.perf_counter() - begun
    counters = opened.counters.minus(before)
    failed = [completion.error for completion in done if completion.error]
    assert not failed and counters.completion_tokens == sum(job.sampling.max_tokens for job in jobs), failed[:1]
    return {
        "seconds": seconds,
        "total_tok_s": (counters.prompt_tokens + counters.completion_tokens) / seconds,
        "output_tok_s": counters.completion_tokens / seconds,
        "requests_s": len(jobs) / seconds,
        "prompt_tokens": counters.prompt_tokens,
        "cached_tokens": counters.cached_tokens,
        "completion_tokens": counters.completion_tokens,
        "steps": counters.steps,
        "preemptions": opened.scheduler.preemptions - preemptions,
        "schedule_seconds": counters.schedule_seconds,
        "compute_seconds": counters.compute_seconds,
        "collect_seconds": counters.collect_seconds,
    }


def floor_seconds(opened: Engine, jobs: list[Request]) -> float:
    """Seconds that the hardware needs for ``jobs``, by rates measured now with the engine's own weights."""
    import torch

    from batchinfer.engine.clock import best_seconds

    decoder, spec = opened.stage.decoder, opened.plan.spec
    layer, device, dtype = decoder.layers[0], opened.stage.device, opened.plan.torch_dtype
    widths = [spec.hidden_size, spec.num_heads * spec.head_dim, spec.hidden_size, spec.intermediate_size]
    products = list(zip([layer.qkv, layer.o, layer.gate_up, layer.down], widths, strict=True))

    def seconds_a_row(linear: Any, width: int) -> float:
        best = float("inf")
        for rows in (64, 128, 256, 512):
            x = torch.randn(rows, width, device=device).to(dtype)
            best = min(best, best_seconds(lambda x=x: linear(x), device, _SECONDS) / rows)
        return best

    body = spec.num_layers * sum(seconds_a_row(linear, width) for linear, width in products)
    head = seconds_a_row(decoder.head, spec.hidden_size)
    source = torch.empty(2**28 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device).fill_(1)
    read_bytes_a_second = source.numel() / best_seconds(lambda: source.view(torch.int64).sum(), device, _SECONDS)
    computed = sum(len(job.prompt_token_ids) + job.sampling.max_tokens - 1 for job in jobs)
    sampled = sum(job.sampling.max_tokens for job in jobs)
    keys = sum(job.sampling.max_tokens * (len(job.prompt_token_ids) + job.sampling.max_tokens / 2) for job in jobs)
    kv_bytes = keys * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    return computed * body + sampled * head + kv_bytes / read_bytes_a_second


def peak_rss_mb() -> float:
    from batchinfer.host import peak_rss

    return round(peak_rss() / 2**20, 1)


# -- the pipeline ---------------------------------------------------------------------------------------------------

WORDS = (
    "a",
    "the",
    "river",
    "market",
    "quiet",
    "letter",
    "seven",
    "winter",
    "open",
    "garden",
    "where",
    "engine",
    "blue",
)
TEMPLATE = "Answer in one sentence: {{ text }}"


def pipeline(rows: int = 50_000, model: str = "smollm2-135m-instruct", repeats: int = 3) -> dict[str, Any]:
    """The whole pipeline with the echo backend against a bare loop that reads, tokenises and writes the same rows.

    Both run in processes of their own, in turn. The bare loop keeps nothing and can resume nothing: it is the floor.
    """
    from batchinfer.engine.model.tokenizer import export_tokenizer

    export_tokenizer(model)  # here, where a model that is missing is told as such and no clock runs
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        folder = Path(name)
        make_rows(folder / "in.parquet", rows)
        ours, bare = [], []
        for i in range(repeats):
            ours.append(_in_process("_run_pipeline", folder / "in.parquet", folder / f"out-{i}", model))
            bare.append(_in_process("_run_bare", folder / "in.parquet", folder / f"bare-{i}.parquet", model))
    ratios = sorted(b["seconds"] / o["seconds"] for o, b in zip(ours, bare))
    median = sorted(ours, key=lambda run: run["seconds"])[len(ours) // 2]
    return {
        "bench": "pipeline",
        "rows": rows,
        "rows_s": round(rows / median["seconds"], 1),
        "bare_rows_s": round(rows / sorted(run["seconds"] for run in bare)[len(bare) // 2], 1),
        "share_of_bare": round(ratios[len(ratios) // 2], 3),
        "peak_rss_mb": median["peak_rss_mb"],
        "bare_peak_rss_mb": bare[0]["peak_rss_mb"],
        "stages": median["stages"],
    }


def make_rows(path: Path, rows: int, seed: int = 3) -> None:
    """A Parquet file of short texts, a few dozen words each, in row groups of 64k."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    words = np.array(WORDS)
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, 65_536):
            count = min(65_536, rows - first)
            lengths = rng.integers(8, 40, count)
            flat = words[rng.integers(0, len(words), lengths.sum())].tolist()
            ends = np.cumsum(lengths)
            texts = [" ".join(flat[end - length : end]) for end, length in zip(ends, lengths)]
            writer.write_table(pa.table([range(first, first + count), texts], schema=schema))


def _in_process(function: str, *arguments: object) -> dict[str, Any]:
    call = f"import batchinfer.bench as b; b.{function}(*{[str(a) for a in arguments]!r})"
    done = subprocess.run([sys.executable, "-c", call], stdout=subprocess.PIPE, check=True, env=dict(os.environ))
    return json.loads(done.stdout)


def _run_pipeline(source: str, output: str, model: str) -> None:
    from batchinfer.job import Job
    from batchinfer.runner import run

    job = Job.from_dict(
        {
            "input": {"path": source},
            "prompt": {"template": TEMPLATE, "chat": "off"},
            "sampling": {"max_tokens": 8},
            "model": {"path": model},
            "engine": {"backend": "echo"},
            "output": {"path": output},
        }
    )
    begun = time.perf_counter()
    summary = run(job, progress=False)
    seconds = time.perf_counter() - begun
    stages = {name: round(value, 3) for name, value in summary.stages.items()}
    print(json.dumps({"seconds": seconds, "peak_rss_mb": peak_rss_mb(), "stages": stages}))


def _run_bare(source: str, output: str, model: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    from batchinfer.engine.model.tokenizer import export_tokenizer

    begun = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(export_tokenizer(model) / "tokenizer.json"))
    with pq.ParquetFile(source) as file:
        schema = file.schema_arrow.append(pa.field("prompt_tokens", pa.int32()))
        with pq.ParquetWriter(output, schema, compression="zstd") as writer:
            for batch in file.iter_batches(1024):
                prompts = [TEMPLATE.replace("{{ text }}", text) for text in batch.column("text").to_pylist()]
                counts = [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(prompts)]
                writer.write_batch(batch.append_column("prompt_tokens", pa.array(counts, pa.int32())))
    print(json.dumps({"seconds": time.perf_counter() - begun, "peak_rss_mb": peak_rss_mb()}))
