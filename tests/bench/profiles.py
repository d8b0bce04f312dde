"""What a profile fitted to short rows gains over one for whatever may come: ``python -m tests.bench.profiles``.

The same requests go through three engines of one model in turn, several times: one built without looking (sequences up
to 8192), one with a narrow profile alone, one with both as ``build --fit`` makes it. Medians, and ratios to
the first within each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from batchinfer import Engine, Request, SamplingParams
from batchinfer.engine.profile import Profile, Sample, as_asked, fit
from batchinfer.host import available_cores


def requests(count: int, prompt: int, completion: int) -> list[Request]:
    """Prompts and completions of random length around two medians, of random tokens; EOS ignored."""
    rng = np.random.default_rng(0)
    prompts, completions = (
        np.clip(rng.lognormal(np.log(median), 0.5, count), 4, 4 * median).astype(int) for median in (prompt, completion)
    )
    return [
        Request(i, rng.integers(10, 32000, into).tolist(), SamplingParams(max_tokens=int(out), ignore_eos=True))
        for i, (into, out) in enumerate(zip(prompts, completions, strict=True))
    ]


def run(engine: Engine, jobs: list[Request]) -> float:
    """Tokens a second, prompt and completion."""
    engine.pages.forget_idle()
    begun = time.perf_counter()
    assert all(done.error is None for done in engine.generate(jobs))
    return sum(len(job.prompt_token_ids) + job.sampling.max_tokens for job in jobs) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=40, help="median tokens")
    parser.add_argument("--completion", type=int, default=24, help="median tokens")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    jobs = requests(options.requests, options.prompt, options.completion)
    wide = Engine(options.model, progress=False)
    sample = Sample(tuple(len(j.prompt_token_ids) for j in jobs), tuple(j.sampling.max_tokens for j in jobs))
    fitted = fit(Profile.of({}, wide.plan.device, wide.plan.spec.max_position), sample)
    engines = {
        "wide": wide,
        "narrow": Engine(options.model, profiles=[as_asked(fitted[0])], progress=False),
        "fitted": Engine(options.model, profiles=list(map(as_asked, fitted)), progress=False),
    }
    for engine in engines.values():
        run(engine, jobs[:16])
    rounds = [{name: run(engine, jobs) for name, engine in engines.items()} for _ in range(options.rounds)]
    for name, engine in engines.items():
        told = {
            "profile": name,
            "for": [str(profile) for profile in engine.plan.profiles],
            "kv_mib": round(sum(cache.nbytes for cache in engine.stage.caches) / 2**20),
            "tok_s": round(statistics.median(each[name] for each in rounds)),
            "times_wide": round(statistics.median(each[name] / each["wide"] for each in rounds), 3),
        }
        print(json.dumps(told))
    print(json.dumps({"device": wide.plan.fingerprint["device"], "cores": available_cores(), "rounds": options.rounds}))


if __name__ == "__main__":
    main()
