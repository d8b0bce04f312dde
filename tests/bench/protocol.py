"""What durability costs: whole runs with the demo model beside a bare loop with the same engine, in pairs.

    python -m tests.bench.protocol [--rows 192] [--pairs 5] [--threads 2]

A run reads ahead, renders, journals every finished row with grouped fsyncs, commits each unit and writes parts,
manifest and summary. The bare loop reads the file, renders it, has the same engine object generate and writes one file
at the end with no fsync; killed, it has nothing. Both make the same tokens. Prints one JSON line: the medians of the
pairs' ratios, of wall time and of the process's CPU time, which tells on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.backends import open_engine
from batchinfer.bench import make_rows
from batchinfer.data.journal import ResultSchema
from batchinfer.data.prompt import PromptRenderer, row_seeds
from batchinfer.job import Job
from batchinfer.runner import run

MODEL = "smollm2-135m-instruct"


class Kept:
    """An engine that outlives the runs that use it; each begins without the others' KV pages."""

    def __init__(self, job: Job) -> None:
        self._backend = open_engine(job, progress=False)

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def generate(self, requests):
        self._backend.engine.pages.forget_idle()
        return self._backend.generate(requests)

    def close(self) -> None:
        """Not yet."""


def job_to(folder: Path, output: Path, threads: int) -> Job:
    return Job.from_dict(
        {
            "input": {"path": str(folder / "in.parquet")},
            "prompt": {"template": "Continue: {{ text }}"},
            "sampling": {"max_tokens": 32, "ignore_eos": True},
            "model": {"path": MODEL},
            "engine": {"threads": threads, "isolation": "none"},
            "output": {"path": str(output)},
            "checkpoint": {"unit_rows": 64},
        }
    )


def whole(job: Job, backend: Kept) -> None:
    with mock.patch("batchinfer.runner.open_backend", lambda *_: backend):
        summary = run(job, progress=False)
    assert summary.state == "complete" and summary.job.failed == 0


def bare(job: Job, backend: Kept) -> None:
    table = pq.read_table(job.input.path[0])
    renderer = PromptRenderer(job.prompt, job.sampling, backend.tokenizer_dir, backend.max_seq_len)
    keys = [(0, row) for row in range(table.num_rows)]
    requests = renderer.render(table, keys, row_seeds(0, "in.parquet", range(table.num_rows)))
    results = pa.Table.from_batches([ResultSchema(1).batch(list(backend.generate(iter(requests))))]).sort_by("row")
    for name in results.column_names[1:]:
        table = table.append_column(name, results[name])
    pq.write_table(table, f"{job.output.path}.parquet", compression="zstd")


def timed(act: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the wall and of the CPU."""
    begun, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - begun, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.protocol", description=__doc__)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        folder = Path(name)
        make_rows(folder / "in.parquet", asked.rows)
        backend = Kept(job_to(folder, folder / "out", asked.threads))
        bare(job_to(folder, folder / "warm", asked.threads), backend)
        times: dict[str, list[tuple[float, float]]] = {"whole": [], "bare": []}
        for pair in range(asked.pairs):
            jobs = {"whole": (whole, folder / f"out-{pair}"), "bare": (bare, folder / f"bare-{pair}")}
            for kind in sorted(jobs, reverse=bool(pair % 2)):  # each goes first every other time
                act, output = jobs[kind]
                job = job_to(folder, output, asked.threads)
                times[kind].append(timed(lambda act=act, job=job: act(job, backend)))
        wall, cpu = (
            [ours[at] / theirs[at] - 1 for ours, theirs in zip(times["whole"], times["bare"])] for at in (0, 1)
        )
        told = {
            "bench": "protocol",
            "rows": asked.rows,
            "whole_seconds": round(statistics.median(seconds for seconds, _ in times["whole"]), 3),
            "bare_seconds": round(statistics.median(seconds for seconds, _ in times["bare"]), 3),
            "overhead_wall": round(statistics.median(wall), 4),
            "overhead_wall_each": [round(share, 4) for share in wall],
            "overhead_cpu": round(statistics.median(cpu), 4),
            "load": os.getloadavg()[0],
        }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
