"""What every quantisation costs and gives, as Markdown tables: ``python -m tests.bench.quantization [MODEL ...]``.

The engines are built first. Then each runs in a process of its own beside plain bfloat16's: both are given the same
requests in turn, several times, so that every ratio of speeds is one of neighbours; shown are medians. Perplexity is
that of the build's held-out rows, which no calibration saw.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer import Request, SamplingParams
from batchinfer.bench import peak_rss_mb, timed_run
from batchinfer.engine.build import build
from batchinfer.engine.engine import Engine
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.quant import LINEARS
from batchinfer.engine.quant.default import default_rows
from batchinfer.engine.text import Text
from tests.engine.train import TRAINED

Recipe = tuple[str, int, str]  # scheme, group size, keys and values
PLAIN: Recipe = ("none", 0, "auto")
RECIPES: list[Recipe] = [
    PLAIN,
    ("none", 0, "int8"),
    *((scheme, 0, "auto") for scheme in ("fp8", "int8", "w8a8", "smoothquant")),
    *((scheme, size, "auto") for size in (32, 128, -1) for scheme in ("int4", "awq", "gptq")),
]
BATCH_SIZE, PROMPT, OUTPUT = 64, 64, 48
MAX_LOSS = {"fp8": 0.01}  # that a build keeps to by leaving matrices as they are; others lose what they lose
TOKENS = 8192  # that quantising is calibrated and measured with: half of what a build takes, for the table's 14


def built(model: str, recipe: Recipe, folder: Path, rows: list[list[int]]) -> EnginePlan:
    """The engine in ``folder``, made if it is not there."""
    scheme, group_size, kv_dtype = recipe
    options = dict(dtype="bfloat16", batch_size=BATCH_SIZE, seq_len=1024, progress=False)
    options |= dict(max_quality_loss=MAX_LOSS.get(scheme, 1e9))
    if not folder.exists():
        options |= dict(quantization=scheme, group_size=group_size, kv_dtype=kv_dtype, calibration=rows)
        build(model, folder, **options)
    return EnginePlan.load(folder)


def requests(vocabulary: int) -> list[Request]:
    """As many as run at once, all of one length, so that none runs with fewer beside it; EOS ignored."""
    rng, sampling = np.random.default_rng(0), SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    return [Request(i, rng.integers(10, vocabulary, PROMPT).tolist(), sampling) for i in range(BATCH_SIZE)]


def serve(plan: str) -> None:
    """Say when it can begin, run the requests once for every line that comes in, and say how that went."""
    engine = Engine(plan)
    jobs = requests(engine.plan.spec.vocab_size)
    list(engine.generate(jobs[:8]))
    print(flush=True)
    for _ in sys.stdin:
        ran = timed_run(engine, jobs)
        print(json.dumps({"tok_s": ran["total_tok_s"], "peak_mb": peak_rss_mb()}), flush=True)


@contextlib.contextmanager
def opened(plan: EnginePlan) -> Iterator[Any]:
    """A function that runs the requests on ``plan`` in another process: the build's memory is not the engine's."""
    command = [sys.executable, "-m", "tests.bench.quantization", "--serve", str(plan.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run() -> dict[str, float]:
            process.stdin.write("\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        process.stdout.readline()
        yield run
        process.stdin.close()


def side_by_side(plain: Any, one: Any, rounds: int) -> dict[str, float]:
    """Medians of both taking turns; who begins changes."""
    pairs = []
    for i in range(rounds):
        ran = {which: which() for which in ((plain, one) if i % 2 == 0 else (one, plain))}
        pairs.append((ran[one], ran[plain]["tok_s"]))
    return {
        "tok_s": statistics.median(ran["tok_s"] for ran, _ in pairs),
        "times": statistics.median(ran["tok_s"] / beside for ran, beside in pairs),
        "peak_mb": max(ran["peak_mb"] for ran, _ in pairs),
    }


def layer_bytes(plan: EnginePlan) -> int:
    return sum(file.stat().st_size for file in (plan.path / "weights").glob("layer-*"))


def row(recipe: Recipe, plan: EnginePlan, plain: EnginePlan, ran: dict[str, float], perplexity: float) -> str:
    scheme, group_size, kv_dtype = recipe
    name = "bfloat16" if scheme == "none" else scheme
    name += {0: "", -1: ", a scale a row"}.get(group_size, f", groups of {group_size}")
    name += f", {len(plan.kept)} of {len(LINEARS) * plan.spec.num_layers} matrices in bfloat16" if plan.kept else ""
    name += "" if kv_dtype == "auto" else f", keys and values in {kv_dtype}"
    size, told = layer_bytes(plan), f"{perplexity:.2f} | · | ·"
    if (quality := plan.quality) is not None:
        loss = quality["perplexity"] / quality["reference_perplexity"] - 1
        told = f"{quality['perplexity']:.2f} | {loss:+.2%} | {quality['agreement']:.1%}"
    return (
        f"| {name} | {size / 1e6:.1f} ({layer_bytes(plain) / size:.1f}× less) | {ran['peak_mb']:.0f} | "
        f"{ran['tok_s']:,.0f} ({ran['times']:.2f}×) | {told} |"
    )


def table(model: str, recipes: list[Recipe], engines: Path, rounds: int) -> None:
    begun = time.monotonic()
    rows: list[list[int]] = []
    plans = {}
    for recipe in recipes:
        plans[recipe] = built(model, recipe, engines / "-".join(map(str, recipe)), rows)
        rows = rows or default_rows(Text(plans[PLAIN].tokenizer_dir), TOKENS)
    qualities = [plan.quality for plan in plans.values() if plan.quality]
    plain, tokens = plans[PLAIN], qualities[0]["tokens"]
    print(f"\n{plain.model} on {plain.fingerprint['device']}, engines built in {time.monotonic() - begun:.0f} s;")
    told = f"{BATCH_SIZE} requests at once, {PROMPT} tokens in and {OUTPUT} out, {rounds} pairs of runs"
    print(f"{told}; {tokens:,} held-out tokens\n")
    print("| | weights of layers, MB | peak memory, MB | tok/s, prompt and output | perplexity | loss | same token |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with opened(plain) as beside:
        for recipe, plan in plans.items():
            with opened(plan) as one:
                ran = side_by_side(beside, one, rounds)
            print(row(recipe, plan, plain, ran, qualities[0]["reference_perplexity"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["smollm2-135m-instruct", str(TRAINED)])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--schemes", help="comma-separated; all unless given")
    parser.add_argument("--engines", type=Path, help="folder to keep the engines in, so that a second run takes them")
    parser.add_argument("--serve", metavar="PLAN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    wanted = options.schemes and {"none", *options.schemes.split(",")}
    recipes = [recipe for recipe in RECIPES if not wanted or recipe[0] in wanted]
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as scratch:
        for model in options.models:
            engines = (options.engines or Path(scratch)) / Path(model).name
            table(model, recipes, engines, options.rounds)


if __name__ == "__main__":
    main()
