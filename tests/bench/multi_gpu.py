"""The native engine over several GPUs, in one command: ``python -m tests.bench.multi_gpu [--seconds 560]``.

For every layout that this machine's GPUs allow: whether it gives the tokens of one GPU on a small model in float32;
output tokens a second in the shapes of Llama 3.1 8B and 70B (FP8, random weights) beside those of one GPU, of vLLM
where that is importable, and of what the simulator expects from the steps of one GPU; bubbles, stage times, and what
went over the links beside what they could carry. ``--device cpu`` tries the command itself, with a tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from batchinfer import Engine, Request, SamplingParams
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.profile import Profile
from batchinfer.engine.scheduler import AHEAD
from batchinfer.engine.simulate import Stages, simulate
from batchinfer.engine.step import StepBatch
from batchinfer.engine.trace import Span
from tests.bench import links
from tests.bench.gpu import vllm
from tests.bench.random_plan import make_plan
from tests.bench.workloads import WORKLOADS, Workload, like_chat
from tests.engine.test_families import prompts
from tests.engine.tiny import make_model

_BEGUN = time.monotonic()
ROWS = 2048  # at once, of each GPU: several together have room for the keys and values of as many more
# Multicast over NVLink can put a host's GPUs out of service.
QUIET = dict(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")


class Layout(NamedTuple):
    tp: int
    pp: int
    prefill: tuple[int, int] | None = None  # tp and pp of further ranks for prompts
    micro_batches: int = 0

    @property
    def gpus(self) -> int:
        return self.tp * self.pp + (self.prefill[0] * self.prefill[1] if self.prefill else 0)

    def __str__(self) -> str:
        parts = [f"tp{self.tp} pp{self.pp}"]
        parts += [f"prefill tp{self.prefill[0]} pp{self.prefill[1]}"] if self.prefill else []
        parts += [f"{self.micro_batches} micro-batches"] if self.micro_batches else []
        return ", ".join(parts)


ONE = Layout(1, 1)
LAYOUTS = [
    Layout(1, 2), Layout(2, 1), Layout(1, 1, (1, 1)),
    Layout(1, 4), Layout(2, 2), Layout(4, 1), Layout(1, 2, (2, 1)),
    Layout(1, 8), Layout(2, 4), Layout(8, 1), Layout(1, 4, (2, 2)),
]  # fmt: skip


def main() -> None:
    asked = _options()
    os.environ |= QUIET
    ends = time.monotonic() + asked.seconds
    layouts = [layout for layout in LAYOUTS if 1 < layout.gpus <= asked.gpus]
    if asked.layouts:
        layouts = [layout for layout in layouts if str(layout) in asked.layouts]
    if not layouts:
        raise SystemExit(f"two GPUs are needed, {asked.gpus} are here; layouts: {', '.join(map(str, LAYOUTS))}")

    def left() -> float:
        return ends - time.monotonic()

    speeds = next(_apart(links.measure, min(90, left()), asked.gpus), None) if asked.device == "cuda" else None
    _tell(kind="links", **(speeds or {}))
    with tempfile.TemporaryDirectory() as folder:
        # As many heads and layers as the small model has.
        small = [layout for layout in layouts if layout.tp <= 6 and layout.pp <= 3 and asked.tokens]
        with ThreadPoolExecutor(max(1, len(small))) as threads:  # it takes a GPU little beside the starting of ranks

            def same(layout: Layout) -> bool | None:
                return next(
                    _apart(_same_tokens, min(90, left()), Path(folder, str(layout)), layout, asked.device), None
                )

            for layout, answer in zip(small, threads.map(same, small)):
                _tell(kind="tokens", layout=str(layout), same_as_one=answer)
        for shape in asked.models:
            plan = make_plan(Path(folder, shape), shape, asked.mode, _profile(ROWS), asked.device)
            torch.cuda.empty_cache() if asked.device == "cuda" else None
            _compare(plan, layouts, asked, speeds or {}, left)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="how many to use")
    parser.add_argument("--models", nargs="+", help="8b, 70b or tiny")
    parser.add_argument("--mode", default="fp8", choices=["fp8", "bf16"])
    parser.add_argument("--workloads", nargs="+", default=["chat", "extract", "uniform"], choices=WORKLOADS)
    parser.add_argument("--requests", type=int, default=1600, help="of chat, others accordingly; of 70B a twelfth")
    parser.add_argument("--layouts", nargs="+", help="those of this name alone")
    parser.add_argument("--no-tokens", dest="tokens", action="store_false", help="measure without comparing tokens")
    parser.add_argument("--seconds", type=float, default=560, help="that all of it may take")
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself")
    asked = parser.parse_args()
    asked.models = asked.models or (["8b", "70b"] if asked.device == "cuda" else ["tiny"])
    return asked


def _compare(plan: EnginePlan, layouts: list[Layout], asked: Any, speeds: dict, left: Callable[[], float]) -> None:
    """Every layout on every workload, the first on one GPU where the model fits it, each workload on another one."""
    shape = plan.model.split("-")[0]
    count = asked.requests // 12 if shape == "70b" else asked.requests
    jobs = {name: like_chat(name, count) for name in asked.workloads}
    alone: dict[str, Any] = {}
    for layout in layouts if shape == "70b" else [ONE, *layouts]:
        about = dict(kind="speed", model=plan.model, layout=str(layout))
        missing = dict.fromkeys(jobs)
        runs = _side_by_side if layout == ONE else _in_layout
        for name, run in runs(plan, layout, jobs, asked.gpus, left()):
            if name is None:
                _tell(**about | {"kind": "opened"}, **run)
                continue
            del missing[name]
            if steps := run.pop("steps_of_one", None):
                alone[name] = run | {"model": _fit(steps)}
            elif name in alone:
                run["over_one"] = round(run["output_tok_s"] / alone[name]["output_tok_s"], 3)
                if not layout.prefill:
                    run["expected"] = _expect(plan, layout, jobs[name], alone[name], speeds)
            if speeds and "moved_bytes_s" in run:
                run["moved_link_share"] = round(run["moved_bytes_s"] / speeds["send"], 4)
            if speeds and layout.gpus > 1:
                run["link_share"] = round(run["bytes_sent"] / run["seconds"] / layout.gpus / speeds["send"], 4)
            _tell(**about, workload=name, **run)
        if missing:
            _tell(**about, error="failed, hung or out of time", workloads=list(missing))
    if asked.device == "cuda" and importlib.util.find_spec("vllm") is not None:
        for tp, pp in ((asked.gpus, 1), (1, asked.gpus)):
            for name, rate in vllm(shape, asked.mode, list(jobs), left() / 2, tp, pp, count).items():
                _tell(kind="vllm", model=plan.model, tp=tp, pp=pp, workload=name, output_tok_s=rate)


Runs = Iterator[tuple[str | None, dict[str, Any]]]  # by their job, and without a name what opening took


def _speeds(plan: EnginePlan, layout: Layout, jobs: dict[str, Workload]) -> Runs:
    tp, pp, prefill, micro_batches = layout
    plan = _with_rows(plan, ROWS * tp * pp)
    options = dict(tp=tp, pp=pp, prefill=prefill, micro_batches=micro_batches)
    options |= dict(trace=plan.path / "trace.json") if prefill else {}
    begun = time.perf_counter()
    with contextlib.closing(Engine(plan, **options)) as engine:
        yield None, {"seconds": round(time.perf_counter() - begun, 1)}
        _run(engine, next(iter(jobs.values()))[:64])  # whatever is compiled on first use
        for name, job in jobs.items():
            yield name, _run(engine, job)


def _in_layout(plan: EnginePlan, layout: Layout, jobs: dict[str, Workload], gpus: int, seconds: float) -> Runs:
    """Each run as soon as it is done: what comes too late takes none along that did not."""
    return _apart(_speeds, seconds, plan, layout, jobs)


def _side_by_side(plan: EnginePlan, layout: Layout, jobs: dict[str, Workload], gpus: int, seconds: float) -> Runs:
    """Those of one GPU, the jobs dealt to all there are."""
    shares = [{str(name): jobs[name] for name in names} for names in np.array_split(list(jobs), min(gpus, len(jobs)))]

    def run(gpu: int) -> list:
        return list(_apart(_on_one, seconds, gpu, plan, layout, shares[gpu]))

    with ThreadPoolExecutor(len(shares)) as threads:
        for found in threads.map(run, range(len(shares))):
            yield from found


def _on_one(gpu: int, plan: EnginePlan, layout: Layout, jobs: dict[str, Workload]) -> Runs:
    if plan.device == "cuda":
        torch.cuda.set_device(gpu)
    return _speeds(plan, layout, jobs)


def _profile(rows: int) -> Profile:
    return Profile(rows, 8192, 4096)


def _with_rows(plan: EnginePlan, rows: int) -> EnginePlan:
    folder = plan.path.with_name(f"{plan.path.name}-{rows}-{os.getpid()}")
    folder.mkdir()
    for part in ("weights", "tokenizer"):
        (folder / part).symlink_to(plan.path / part)
    plan = replace(plan, path=folder, profiles=(_profile(rows),))
    plan.save()
    return plan


def _run(engine: Engine, job: Workload) -> dict[str, Any]:
    engine.pages.forget_idle()
    ranks = bool(engine.stage.details())
    if ranks:
        engine.stage.forget()
    before = engine.counters.copy()
    with contextlib.nullcontext([]) if ranks else _timed_steps(engine) as steps:
        begun = time.perf_counter()
        made = sum(len(completion.outputs[0].token_ids) for completion in engine.generate(_requests(job)))
        seconds = time.perf_counter() - begun
    moved = _moved(engine, [span for span in engine.trace.spans if span.begun > begun]) if engine.trace else {}
    assert made == sum(output for _, output in job)
    counted, told = engine.counters.minus(before), engine.stage.details()
    names = ("partition", "bubble", "rank_bubbles", "rank_step_ms", "rank_moving_pages", "slot_occupancy")
    names += ("bytes_sent", "step_tokens")
    return {
        "output_tok_s": round(made / seconds),
        "seconds": round(seconds, 2),
        "steps": counted.steps,
        "schedule_seconds": round(counted.schedule_seconds, 2),
        **{name: told[name] for name in names if name in told},
        **moved,
        **({} if ranks else {"steps_of_one": steps}),
    }


def _moved(engine: Engine, spans: list[Span]) -> dict[str, float]:
    """How fast keys and values went to the ranks that decode, while they went, and how much of that beside steps there.

    That is, from a GPU whose work is done and whose target's pages are free, until all is there.
    """
    spec, (before, decoding) = engine.plan.spec, engine.stage.world.layouts
    width = 1 if engine.plan.kv_dtype == "fp8" else 2
    page = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width * engine.stage.page_size
    went = [span for span in spans if span.name == "keys and values" and span.rank in before.ranks]
    size = sum(span.about["pages"] * page / len(before.ranks) for span in went)
    seconds = sum(span.ended - span.begun for span in went)
    beside = 0.0
    for rank in decoding.ranks:
        steps = [span for span in spans if span.rank == rank]
        beside += sum(max(0.0, min(a.ended, b.ended) - max(a.begun, b.begun)) for a in went for b in steps)
    beside /= len(decoding.ranks)
    return {"moved_bytes_s": round(size / seconds), "moved_beside_steps": round(beside / seconds, 4)} if seconds else {}


def _requests(job: Workload) -> list[Request]:
    return [Request(i, p, SamplingParams(max_tokens=o, ignore_eos=True)) for i, (p, o) in enumerate(job)]


@contextlib.contextmanager
def _timed_steps(engine: Engine) -> Iterator[list[tuple[float, float, float]]]:
    """Of each step its tokens, the keys that its decodes read, and when its tokens came."""
    launch, steps = engine.stage.launch, []

    def timed(step: StepBatch) -> Callable[[], np.ndarray]:
        tokens, about = launch(step), _about(step)

        def wait() -> np.ndarray:
            sampled = tokens()
            steps.append((*about, time.perf_counter()))
            return sampled

        return wait

    engine.stage.launch = timed
    try:
        yield steps
    finally:
        engine.stage.launch = launch


def _about(step: StepBatch) -> tuple[float, float]:
    return float(step.num_tokens), float(step.context_lens[: step.singles].sum())


def _fit(steps: list[tuple[float, float, float]]) -> list[float]:
    """Seconds of a step of one GPU: those that every step takes, and those of a token and of a key read."""
    tokens, keys, ends = np.array(steps).T
    rows = np.stack([np.ones(len(tokens) - 1), tokens[1:], keys[1:]], 1)
    return np.linalg.lstsq(rows, np.diff(ends), rcond=None)[0].clip(0).tolist()


def _expect(plan: EnginePlan, layout: Layout, job: Workload, alone: dict[str, Any], speeds: dict) -> dict[str, float]:
    """What the simulator makes of the steps of one GPU, dealt evenly to all."""
    spec, (fixed, token, key) = plan.spec, alone["model"]
    reduced = 2 * spec.num_layers / layout.pp * spec.hidden_size * 2 * (layout.tp > 1) / speeds.get("all_reduce", 1e12)

    def stages(step: StepBatch) -> list[float]:
        tokens, keys = _about(step)
        return [(fixed + tokens * token + keys * key) / layout.gpus + tokens * reduced] * layout.pp

    profile = _profile(ROWS * layout.gpus)
    simulated = simulate(
        _requests(job), profile, Stages(stages, hop=1e-4), layout.micro_batches or layout.pp, page_size=64,
        ahead=AHEAD, engine_seconds=alone["schedule_seconds"] / alone["steps"],
    )  # fmt: skip
    made = sum(output for _, output in job)
    return {"output_tok_s": round(made / simulated.seconds), "bubble": round(simulated.bubble, 4)}


def _same_tokens(folder: Path, layout: Layout, device: str) -> bool:
    """Whether a layout says what one GPU says."""
    model = str(make_model(folder, "llama"))
    options = dict(dtype="float32", device=device, batch_size=16, step_tokens=128, progress=False)
    tp, pp, prefill, micro_batches = layout

    def said(**how: Any) -> dict:
        with contextlib.closing(Engine(model, **how, **options)) as engine:
            return {c.key: c.outputs for c in engine.generate(prompts(32), SamplingParams(max_tokens=32))}

    return said(tp=tp, pp=pp, prefill=prefill, micro_batches=micro_batches) == said()


def _apart(work: Callable[..., Any], seconds: float, *arguments: Any) -> Iterator[Any]:
    """What ``work`` yields or returns, in a process of its own, until it ends, fails, or takes longer and is killed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    ends = time.monotonic() + max(1.0, seconds)
    try:
        while ours.poll(max(0.0, ends - time.monotonic())):
            yield ours.recv()
    except EOFError:
        return
    finally:
        process.kill()
        process.join()


def _answer(connection: Any, work: Callable[..., Any], arguments: tuple) -> None:
    found = work(*arguments)
    for each in found if isinstance(found, Iterator) else [found]:
        connection.send(each)


def _tell(**about: Any) -> None:
    print(json.dumps(about | {"at": round(time.monotonic() - _BEGUN)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
