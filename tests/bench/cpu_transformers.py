"""This engine against transformers on a CPU: padded static batches, and transformers' own continuous batching.

    python -m tests.bench.cpu_transformers [--requests 256] [--threads 2] [--rounds 3]

Every contender runs in a process of its own, on the same token ids (``batchinfer.bench.workload``, EOS ignored,
greedy, bfloat16), in turn. Tokens a second count prompt and wanted output tokens; loading is not counted. Static
batching is run once, because it takes minutes; the others ``--rounds`` times, and the median is quoted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from batchinfer.bench import workload
from batchinfer.host import peak_rss

MODEL = "smollm2-135m-instruct"
STATIC_BATCH = 32


def run_batchinfer(requests: int, threads: int) -> float:
    from batchinfer import Engine

    engine = Engine(MODEL, dtype="bfloat16", threads=threads)
    jobs = workload(requests)
    list(engine.generate(jobs[:8]))
    engine.pages.forget_idle()
    begun = time.perf_counter()
    done = list(engine.generate(jobs))
    seconds = time.perf_counter() - begun
    assert sum(len(c.outputs[0].token_ids) for c in done) == sum(job.sampling.max_tokens for job in jobs)
    return seconds


def load_transformers(threads: int):
    import torch
    from transformers import AutoModelForCausalLM

    from batchinfer.engine.model.source import ModelSource

    torch.set_num_threads(threads)
    source = ModelSource.resolve(MODEL)
    model = AutoModelForCausalLM.from_pretrained(source.folder, gguf_file=source.gguf.name, dtype=torch.bfloat16)
    return model.eval()


def run_static(requests: int, threads: int) -> float:
    """``generate`` on left-padded batches in order of arrival; each goes on until its longest output is done."""
    import torch

    model = load_transformers(threads)
    jobs = workload(requests)

    def generate(batch, tokens):
        width = max(len(job.prompt_token_ids) for job in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(batch):
            ids[row, width - len(job.prompt_token_ids) :] = torch.tensor(job.prompt_token_ids)
            mask[row, width - len(job.prompt_token_ids) :] = 1
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
            )

    generate(jobs[:2], 4)
    begun = time.perf_counter()
    for first in range(0, requests, STATIC_BATCH):
        batch = jobs[first : first + STATIC_BATCH]
        generate(batch, max(job.sampling.max_tokens for job in batch))
    return time.perf_counter() - begun


def run_continuous(requests: int, threads: int) -> float:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load_transformers(threads)
    jobs = workload(requests)
    longest = max(len(job.prompt_token_ids) + job.sampling.max_tokens for job in jobs)
    blocks = -(-longest // 32) * 128
    manager = model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=256),
        continuous_batching_config=ContinuousBatchingConfig(page_size=32, num_blocks=blocks, max_batch_tokens=512),
    )
    with manager as manager:
        begun = time.perf_counter()
        for job in jobs:
            manager.add_request(job.prompt_token_ids, str(job.key), max_new_tokens=job.sampling.max_tokens)
        produced = 0
        for _ in range(requests):
            result = manager.get_result(timeout=600)
            assert result is not None and not result.error, result
            produced += len(result.generated_tokens)
        seconds = time.perf_counter() - begun
    assert produced == sum(job.sampling.max_tokens for job in jobs), produced
    return seconds


CONTENDERS = {"batchinfer": run_batchinfer, "continuous": run_continuous, "static": run_static}


def measure(name: str, requests: int, threads: int) -> dict:
    command = [sys.executable, "-m", "tests.bench.cpu_transformers", "--only", name]
    command += ["--requests", str(requests), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"error": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CONTENDERS, help="run one contender here and print its figures")
    options = parser.parse_args()
    jobs = workload(options.requests)
    tokens = sum(len(job.prompt_token_ids) + job.sampling.max_tokens for job in jobs)
    if options.only:
        seconds = CONTENDERS[options.only](options.requests, options.threads)
        peak = peak_rss() / 2**20
        print(json.dumps({"total_tok_s": tokens / seconds, "seconds": seconds, "peak_rss_mb": peak}))
        return
    results: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for round_ in range(options.rounds):
        for name in CONTENDERS:
            if name != "static" or round_ == 0:
                results[name].append(measure(name, options.requests, options.threads))
                print(f"round {round_ + 1} {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    report = {}
    for name, runs in results.items():
        good = [run for run in runs if "error" not in run]
        report[name] = {
            "total_tok_s": round(statistics.median(run["total_tok_s"] for run in good), 1) if good else None,
            "peak_rss_mb": round(max(run["peak_rss_mb"] for run in good)) if good else None,
            "runs": len(good),
        }
    ours = report["batchinfer"]["total_tok_s"]
    for name in ("static", "continuous"):
        if ours and report[name]["total_tok_s"]:
            report[f"ratio_to_{name}"] = round(ours / report[name]["total_tok_s"], 2)
    print(json.dumps({"bench": "cpu_transformers", "requests": options.requests, "tokens": tokens} | report))


if __name__ == "__main__":
    main()
