"""Two stages of one thread beside one process of two, in one run: ``python -m tests.bench.pipelines``.

The same job with in-flight batching and static batching (a batch ends before the next begins), with 1, P and 2P
micro-batches, in turn and ``--repeats`` times. Prints a JSON line a run, then the medians: tokens a second, their ratio
to those of one process in the same round, and the bubble. ``--layouts`` adds two shares of each layer and ranks for
prompts apart from one that decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from typing import Any

from batchinfer import Engine
from batchinfer.bench import workload

MODEL = "smollm2-135m-instruct"
LAYOUTS = {
    "2 shares": dict(tp=2),
    "prompts apart": dict(prefill=(1, 1)),
}
BATCHINGS = ("in-flight", "static")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--kv-cache-gib", type=float, default=2, help="of each rank, so that a batch finds its pages")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=[])
    parser.add_argument("--batchings", nargs="+", choices=BATCHINGS, default=BATCHINGS)
    asked = parser.parse_args()
    options = dict(batch_size=asked.batch_size, kv_cache_gib=asked.kv_cache_gib, progress=False)
    layouts = {
        f"2 stages, {count} micro-batch{'es' * (count > 1)}": dict(pp=2, micro_batches=count)
        for count in asked.micro_batches
    }
    layouts |= {name: LAYOUTS[name] for name in asked.layouts}
    engines = {"one process, 2 threads": Engine(MODEL, threads=2, **options)}
    engines |= {name: Engine(MODEL, threads=1, **layout, **options) for name, layout in layouts.items()}
    jobs = workload(asked.requests)
    for engine in engines.values():
        list(engine.generate(jobs[:4]))
    runs = defaultdict(list)
    for _ in range(asked.repeats):
        for batching in asked.batchings:
            alone = 0.0
            for name, engine in engines.items():
                told = _run(engine, jobs, asked.batch_size if batching == "static" else len(jobs))
                alone = alone or told["tok_s"]
                told["ratio"] = round(told["tok_s"] / alone, 3)
                runs[batching, name].append(told)
                print(json.dumps({"batching": batching, "engine": name, **told}), flush=True)
    for engine in engines.values():
        engine.close()
    for (batching, name), found in runs.items():
        medians = {key: statistics.median(run[key] for run in found) for key in ("tok_s", "ratio", "bubble")}
        print(
            f"{batching:10} {name:26} {medians['tok_s']:7.0f} tok/s  {medians['ratio']:.2f}×  {medians['bubble']:6.1%}"
        )


def _run(engine: Engine, jobs: list, at_once: int) -> dict[str, Any]:
    engine.pages.forget_idle()
    if engine.stage.details():
        engine.stage.forget()
    before = engine.counters.copy()
    seconds = 0.0
    for first in range(0, len(jobs), at_once):
        begun = time.perf_counter()
        for completion in engine.generate(jobs[first : first + at_once]):
            assert completion.error is None
        seconds += time.perf_counter() - begun
    done, told = engine.counters.minus(before), engine.stage.details()
    return {
        "tok_s": round((done.prompt_tokens + done.completion_tokens) / seconds, 1),
        "steps": done.steps,
        "bubble": told.get("bubble", 0.0),
        "partition": told.get("partition"),
        "rank_bubbles": list(told.get("rank_bubbles", {}).values()),
        "rank_moving_pages": list(told.get("rank_moving_pages", {}).values()),
        "rank_step_ms": list(told.get("rank_step_ms", {}).values()),
        "load": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
