"""Pipelines: measured here, and simulated for more ranks than are here."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer.bench import workload
from batchinfer.engine.balance import SAMPLED, Costs, FloatingHead, deal
from batchinfer.engine.engine import Engine
from batchinfer.engine.profile import Profile
from batchinfer.engine.scheduler import AHEAD
from batchinfer.engine.simulate import Simulated, Stages, simulate
from batchinfer.engine.step import StepBatch
from batchinfer.engine.trace import Span
from batchinfer.request import Request

STAGES = (1, 2, 4, 8, 16)
_USUAL = 64  # tokens of a step, for what a token costs
_ALIKE = 16  # steps next to each other in cost, which would take as long where nothing disturbs them


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a layer for a step of so many tokens, and of the head for so many samples."""

    layer: float
    layer_token: float
    head: float
    head_sample: float
    usual: tuple[float, ...] = ()  # seconds that steps and heads should have taken, in order,
    jitter: tuple[float, ...] = ()  # and how many times as long they took: stages wait for the slower one

    def stages(self, partition: Sequence[int], hop: float) -> Stages:
        drawn = np.random.default_rng(0)

        def disturbed(seconds: float) -> float:
            if not self.jitter:
                return seconds
            least, most = _ALIKE, max(_ALIKE, len(self.jitter) - _ALIKE)  # what is cheaper or dearer is as they are
            place = min(max(np.searchsorted(self.usual, seconds), least), most) + drawn.integers(-_ALIKE, _ALIKE)
            return seconds * self.jitter[min(place, len(self.jitter) - 1)]

        def layers(step: StepBatch) -> list[float]:
            layer = self.layer + self.layer_token * step.num_tokens
            return [disturbed(count * layer) for count in partition]

        def head(step: StepBatch) -> float:
            return disturbed(self.head + self.head_sample * len(step.sampled)) if len(step.sampled) else 0.0

        return Stages(
            layers,
            head,
            hop=hop,
            floating=FloatingHead(partition, self.a_token(_USUAL)) if len(partition) > 1 else None,
        )

    def a_token(self, tokens: int) -> Costs:
        """For ``deal``, in steps of so many tokens."""
        samples = SAMPLED * tokens
        return Costs(self.layer / tokens + self.layer_token, 0.0, self.head / samples + self.head_sample)

    @classmethod
    def fit(cls, partition: Sequence[int], spans: Sequence[Span]) -> StepCosts:
        """By least squares, to what the ranks of a pipeline without tensor parallelism took."""
        rows, taken = [], []
        for span in spans:
            layers, samples = partition[span.rank], span.about.get("samples")
            if samples is None:
                rows.append((layers, layers * span.about["tokens"], 0, 0))
            else:
                rows.append((0, 0, samples > 0, samples))
            taken.append(span.ended - span.begun)
        found, *_ = np.linalg.lstsq(np.array(rows, float), np.array(taken), rcond=None)
        costs = np.maximum(found, 0)
        usual = np.array(rows, float) @ costs
        in_order = np.argsort(usual, kind="stable")[np.count_nonzero(usual <= 0) :]
        usual, taken = usual[in_order], np.array(taken)[in_order]
        alike = np.array_split(taken / usual, max(1, len(usual) // _ALIKE))
        jitter = np.concatenate([part / part.mean() for part in alike])
        return cls(*costs.tolist(), tuple(usual.tolist()), tuple(jitter.tolist()))


@dataclass(frozen=True)
class _Run:
    partition: tuple[int, ...]
    profile: Profile
    layers: int
    tokens_per_second: float
    bubble: float
    engine_seconds: float  # a step
    hop_seconds: float
    pages: dict[str, int]
    spans: list[Span]


def pipeline_sim(
    model: str = "smollm2-135m-instruct", requests: int = 256, micro_batches: Sequence[int] = (1, 2, 3, 4)
) -> dict[str, Any]:
    """Run two stages here, with several numbers of micro-batches; simulate the same, and then what is not here.

    What layers and head cost is fitted to the run with two micro-batches alone, so that the others are foretold.
    """
    jobs = workload(requests)
    runs = {count: _run(model, jobs, count, requests) for count in micro_batches}
    fitted = runs[2]
    costs = StepCosts.fit(fitted.partition, fitted.spans)
    checks = []
    for count, run in runs.items():
        told = _simulate(jobs, run, costs, run.partition, count, run.profile)
        checks.append(
            {
                "stages": 2,
                "micro_batches": count,
                "partition": list(run.partition),
                "measured_tok_s": round(run.tokens_per_second, 1),
                "simulated_tok_s": round(told.tokens_per_second, 1),
                "ratio": round(told.tokens_per_second / run.tokens_per_second, 3),
                "measured_bubble": round(run.bubble, 4),
                "simulated_bubble": round(told.bubble, 4),
            }
        )
    foretold = []
    for stages in STAGES:
        partition = deal(fitted.layers, stages, costs.a_token(_USUAL), head_floats=stages > 1)
        for count in (stages, 2 * stages) if stages > 1 else (1,):
            profile = replace(fitted.profile, batch_size=max(64 * stages, 64))
            more = replace(fitted, pages={})
            told = _simulate(workload(4 * profile.batch_size), more, costs, partition, count, profile)
            figures = {"stages": stages, "micro_batches": count, "partition": list(partition)}
            foretold.append(figures | _figures(told))
    return {"bench": "pipeline-sim", "model": model, "requests": requests, "checks": checks, "foretold": foretold}


def _run(model: str, jobs: list[Request], micro_batches: int, batch_size: int) -> _Run:
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as folder:
        trace = Path(folder, "trace.json")
        engine = Engine(
            model, device="cpu", pp=2, threads=1, micro_batches=micro_batches, batch_size=batch_size, trace=trace,
            progress=False,
        )  # fmt: skip
        list(engine.generate(jobs[:4]))  # warm-up: first touch
        engine.stage.forget()
        engine.trace.spans.clear()
        before = engine.counters.copy()
        engine.pages.forget_idle()
        completions = list(engine.generate(jobs))
        assert not any(completion.error for completion in completions)
        counters, told = engine.counters.minus(before), engine.stage.details()
        engine.close()
    spans = [span for span in engine.trace.spans if span.about.keys() & {"tokens", "samples"}]
    return _Run(
        engine.stage.layout.partition,
        engine.plan.profiles[-1],
        engine.plan.spec.num_layers,
        (counters.prompt_tokens + counters.completion_tokens) / told["seconds"],
        told["bubble"],
        (counters.schedule_seconds + counters.collect_seconds) / counters.steps,
        _hop_seconds(spans),
        {"page_size": engine.stage.page_size, "num_pages": engine.stage.num_pages},
        spans,
    )


def _hop_seconds(spans: Sequence[Span]) -> float:
    """From when a rank could begin a step, its last one done and the stage before as well, to when it did."""
    ended = {(span.rank, span.name): span.ended for span in spans}
    free: dict[int, float] = {}
    hops = []
    for span in sorted(spans, key=lambda span: span.begun):
        before = ended.get((span.rank - 1, span.name))
        if before is not None and span.rank in free:
            hops.append(span.begun - max(before, free[span.rank]))
        free[span.rank] = span.ended
    return float(np.median(hops))


def _simulate(
    jobs: list[Request], run: _Run, costs: StepCosts, partition: Sequence[int], micro_batches: int, profile: Profile
) -> Simulated:
    stages = costs.stages(partition, run.hop_seconds)
    return simulate(jobs, profile, stages, micro_batches, ahead=AHEAD, engine_seconds=run.engine_seconds, **run.pages)


def _figures(told: Simulated) -> dict[str, Any]:
    return {"tok_s": round(told.tokens_per_second, 1), "bubble": round(told.bubble, 4)}


# -- GPUs that are not here ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Rates assumed of an H100 and its links; that of a sum was measured between two of them."""

    flops: float = 650e12  # bf16 products of a few thousand rows
    read_bytes: float = 2.7e12  # a second, weights and keys
    sum_bytes: float = 329e9  # a second, bus bandwidth of an all-reduce of 8
    sum_seconds: float = 20e-6  # its least
    launch_seconds: float = 30e-6  # small kernels of a layer


# Llama-3.1-70B: layers, hidden, intermediate, query heads × their width, KV heads × theirs, vocabulary
_LAYERS, _HIDDEN, _INNER, _Q, _KV, _VOCABULARY = 80, 8192, 28672, 8192, 1024, 128_256


def foretell_gpus(
    layouts: Sequence[tuple[int, int]] = ((8, 1), (4, 2), (2, 4), (8, 4), (4, 8)),
) -> list[dict[str, Any]]:
    """A 70B model in bfloat16 on 8 and on 32 GPUs, by the arithmetic of its products, reads and sums."""
    gpu, weights = Gpu(), _HIDDEN * (2 * _Q + 2 * _KV + 3 * _INNER)

    def layers(step: StepBatch, tp: int, partition: Sequence[int]) -> list[float]:
        tokens = step.num_tokens
        product = max(2 * weights * tokens / gpu.flops, 2 * weights / gpu.read_bytes) / tp
        keys = int(step.context_lens.sum()) * 2 * _KV * 2 / gpu.read_bytes / tp
        wire = 2 * (tp - 1) / tp * tokens * _HIDDEN * 2 / gpu.sum_bytes
        layer = product + keys + gpu.launch_seconds + (2 * max(wire, gpu.sum_seconds) if tp > 1 else 0)
        return [count * layer for count in partition]

    def head(step: StepBatch, tp: int) -> float:
        weights = 2 * _VOCABULARY * _HIDDEN / tp
        return max(weights * len(step.sampled) / gpu.flops, weights / gpu.read_bytes)

    told = []
    for tp, pp in layouts:
        gpus = tp * pp
        profile = Profile(128 * gpus, 4096, 2048)
        partition = deal(_LAYERS, pp, Costs(1.0, 0.0, _VOCABULARY * _HIDDEN / weights))
        stages = Stages(
            functools.partial(layers, tp=tp, partition=partition), functools.partial(head, tp=tp), hop=200e-6
        )
        jobs = workload(4 * profile.batch_size)
        found = simulate(jobs, profile, stages, pp, ahead=AHEAD, engine_seconds=300e-6)
        told.append({"gpus": gpus, "tp": tp, "pp": pp, "partition": list(partition)} | _figures(found))
    return told
