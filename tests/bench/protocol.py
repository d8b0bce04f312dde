"""What durability costs, and an engine in a process of its own: whole runs with the demo model beside a bare loop.

    python -m tests.bench.protocol [--rows 192] [--rounds 5] [--threads 2]

A run reads ahead, renders, journals every finished row with grouped fsyncs, commits each unit and writes parts,
manifest and summary. The bare loop reads the file, renders it, has the same engine object generate and writes one file
at the end with no fsync; killed, it has nothing. The third contender is the same run with its engine in another
process. All make the same tokens, with engines that stay open. Prints one JSON line: medians over the rounds, of wall
time and of the process's CPU time, which tells on a machine that others use too.
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

from batchinfer.backends import Backend, open_backend
from batchinfer.bench import make_rows
from batchinfer.data.journal import ResultSchema
from batchinfer.data.prompt import PromptRenderer, row_seeds
from batchinfer.job import Job
from batchinfer.runner import run

MODEL = "smollm2-135m-instruct"


class Kept:
    """An engine that outlives the runs that use it."""

    def __init__(self, job: Job) -> None:
        self._backend = open_backend(job, progress=False)

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def close(self) -> None:
        """Not yet."""

    def leave(self) -> None:
        self._backend.close()


def job_to(folder: Path, output: Path, threads: int, isolation: str = "none") -> Job:
    return Job.from_dict(
        {
            "input": {"path": str(folder / "in.parquet")},
            "prompt": {"template": "Continue: {{ text }}"},
            "sampling": {"max_tokens": 32, "ignore_eos": True},
            "model": {"path": MODEL},
            # no run finds the pages of another
            "engine": {"threads": threads, "isolation": isolation, "prefix_sharing": False},
            "output": {"path": str(output)},
            "checkpoint": {"unit_rows": 64},
        }
    )


def whole(job: Job, backend: Backend) -> None:
    with mock.patch("batchinfer.runner.open_backend", lambda *_: backend):
        summary = run(job, progress=False)
    assert summary.state == "complete" and summary.job.failed == 0


def bare(job: Job, backend: Backend) -> None:
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        folder = Path(name)
        make_rows(folder / "in.parquet", asked.rows)
        here, apart = (
            Kept(job_to(folder, folder / "out", asked.threads, isolation)) for isolation in ("none", "process")
        )
        contenders = {"bare": (bare, here), "whole": (whole, here), "isolated": (whole, apart)}
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in contenders}
        for turn in range(-1, asked.rounds):  # the first warms up
            for kind in sorted(contenders, reverse=bool(turn % 2)):
                act, backend = contenders[kind]
                job = job_to(folder, folder / f"{kind}{turn}", asked.threads)
                times[kind].append(timed(lambda act=act, job=job, backend=backend: act(job, backend)))
        apart.leave()
    times = {kind: took[1:] for kind, took in times.items()}

    def over(kind: str, base: str, at: int) -> list[float]:
        return [round(ours[at] / theirs[at] - 1, 4) for ours, theirs in zip(times[kind], times[base])]

    told = {
        "bench": "protocol",
        "rows": asked.rows,
        "seconds": {kind: round(statistics.median(wall for wall, _ in took), 3) for kind, took in times.items()},
        "durability_wall": statistics.median(over("whole", "bare", 0)),
        "durability_wall_each": over("whole", "bare", 0),
        "durability_cpu": statistics.median(over("whole", "bare", 1)),
        "isolation_wall": statistics.median(over("isolated", "whole", 0)),
        "isolation_wall_each": over("isolated", "whole", 0),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
