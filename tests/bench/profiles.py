"""What a profile fitted to short rows gains over one for whatever may come: ``python -m tests.bench.profiles [MODEL]``.

The same requests go through three engines of one model: one built without looking (sequences up to 8192, or what the
model knows), one with a narrow profile alone, one with both as ``build --fit`` makes it. Each is opened in a process of
its own, in turn, several times: the first takes what memory it wants for keys and values, the others are given as much
(``--own-memory``: each takes what it wants). Shown are medians, and ratios to the first within each round. MODEL is
also a shape of ``random_plan``, for machines that have no model: on a GPU ``1b --requests 16000``. Where a step costs
more than what it computes, as with small models, more rows at once are faster: ``tests/engine/trained --requests 1024
--prompt 12 --completion 48``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from batchinfer.bench import peak_rss_mb, timed_run
from batchinfer.engine.build import build, choose_device
from batchinfer.engine.engine import Engine
from batchinfer.engine.model.source import ModelSource
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.profile import Profile, Sample, as_asked, fit
from batchinfer.engine.tactics import choose
from batchinfer.host import available_cores
from batchinfer.request import Request, SamplingParams
from tests.bench.random_plan import SHAPES, make_plan

WHOLE = 8192  # positions that the one built without looking is for


def requests(count: int, prompt: int, completion: int, vocabulary: int) -> list[Request]:
    """Prompts and completions of random length around two medians, of random tokens; EOS ignored."""
    rng = np.random.default_rng(0)
    prompts, completions = (
        np.clip(rng.lognormal(np.log(median), 0.5, count), 4, 4 * median).astype(int) for median in (prompt, completion)
    )
    return [
        Request(i, rng.integers(10, vocabulary, into).tolist(), SamplingParams(max_tokens=int(out), ignore_eos=True))
        for i, (into, out) in enumerate(zip(prompts, completions, strict=True))
    ]


def built(model: str, mode: str, profiles: tuple[Profile, ...], folder: Path) -> EnginePlan:
    if model not in SHAPES:
        return build(model, folder, profiles=list(map(as_asked, profiles)), progress=False)
    plan = replace(make_plan(folder, model, mode, profiles[0], choose_device("auto")), profiles=profiles)
    replace(plan, tactics=choose(plan)).save()
    return EnginePlan.load(folder)


def measured(folder: Path, jobs: list[Request], kv_cache_gib: float) -> dict[str, float]:
    """How one engine opens and runs ``jobs``, and what memory it takes; 0: what it wants for keys and values."""
    begun = time.perf_counter()
    engine = Engine(folder, kv_cache_gib=kv_cache_gib)
    opened = time.perf_counter() - begun
    list(engine.generate(jobs[:32]))  # whatever is compiled on first use
    ran = timed_run(engine, jobs)
    pages, a_page = engine.stage.num_pages, engine.stage.decoder.attention.page_bytes(engine.plan.spec.num_layers)
    kept = {"kv_tokens": pages * engine.stage.page_size, "kv_gib": pages * a_page / 2**30}
    return {"tok_s": ran["total_tok_s"], "open_s": opened, **kept, "peak_rss_mb": peak_rss_mb()}


def known(model: str) -> DecoderSpec:
    return SHAPES[model] if model in SHAPES else DecoderSpec.from_config(ModelSource.resolve(model).config())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", nargs="?", default="smollm2-135m-instruct", help="a model, or one of " + ", ".join(SHAPES)
    )
    parser.add_argument("--mode", choices=["bf16", "fp8"], default="bf16", help="of a random model")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=40, help="median tokens")
    parser.add_argument("--completion", type=int, default=24, help="median tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--own-memory", action="store_true", help="each takes what it wants for keys and values")
    options = parser.parse_args()
    spec = known(options.model)
    jobs = requests(options.requests, options.prompt, options.completion, min(spec.vocab_size, 32000))
    sample = Sample(tuple(len(j.prompt_token_ids) for j in jobs), tuple(j.sampling.max_tokens for j in jobs))
    whole = Profile.of({"seq_len": min(WHOLE, spec.max_position)}, choose_device("auto"), spec.max_position)
    fitted = fit(whole, sample)
    profiles = {"wide": (whole,), "narrow": fitted[:1], "fitted": fitted}
    spawn, rounds = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as scratch:
        plans = {name: built(options.model, options.mode, each, Path(scratch, name)) for name, each in profiles.items()}
        device = plans["wide"].fingerprint["device"]
        print(json.dumps({"model": plans["wide"].model, "device": device, "cores": available_cores()}), flush=True)
        for _ in range(options.rounds):
            rounds.append({})
            for name, plan in plans.items():
                wide = rounds[-1].get("wide", {"kv_gib": 0.0})
                memory = 0.0 if options.own_memory else wide["kv_gib"]
                with ProcessPoolExecutor(1, spawn) as process:  # the next one finds empty memory
                    rounds[-1][name] = process.submit(measured, plan.path, jobs, memory).result()
    for name, plan in plans.items():
        told = {key: round(statistics.median(each[name][key] for each in rounds), 3) for key in rounds[0][name]}
        times = statistics.median(each[name]["tok_s"] / each["wide"]["tok_s"] for each in rounds)
        print(
            json.dumps({"profile": name, "for": list(map(str, plan.profiles)), **told, "times_wide": round(times, 3)})
        )


if __name__ == "__main__":
    main()
