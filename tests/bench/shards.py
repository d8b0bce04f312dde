"""Throughput of one run and of two shards, with the echo engine: ``python -m tests.bench.shards [ROWS] [REPEATS]``.

Both are processes of their own, and a time is from the start of the first to the end of the last, imports and the
planning of the output included. Order alternates; medians are printed as one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.echo_jobs import texts, tokenizer_dir, write

JOB = """
[input]
path = "{folder}/in.parquet"
[prompt]
template = "Say {{{{ text }}}}"
[model]
path = "echo"
[engine]
backend = "echo"
[output]
path = "{folder}/out"
"""


def seconds(folder: Path, name: str, shards: list[str]) -> float:
    command = [sys.executable, "-m", "tests.slow_echo", "run", str(folder / "job.toml"), "-q", "-o", str(folder / name)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    begun = time.perf_counter()
    running = [subprocess.Popen([*command, *shard], env=env, stdout=subprocess.DEVNULL) for shard in shards]
    assert [process.wait() for process in running] == [0] * len(running)
    return time.perf_counter() - begun


def main() -> None:
    rows, repeats = (int(value) for value in (*sys.argv[1:], *("400000", "3")[len(sys.argv) - 1 :]))
    tokenizer_dir()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write(folder / "in.parquet", texts(rows), row_group_size=20_000)
        (folder / "job.toml").write_text(JOB.format(folder=folder))
        one, two = [], []
        for repeat in range(repeats):
            measured = [
                lambda name: one.append(seconds(folder, name, [[]])),
                lambda name: two.append(seconds(folder, name, [["--shard", "0/2"], ["--shard", "1/2"]])),
            ]
            for index, measure in enumerate(measured if repeat % 2 == 0 else measured[::-1]):
                measure(f"out-{repeat}-{index}")
    told = {
        "bench": "shards",
        "rows": rows,
        "one_rows_s": round(rows / statistics.median(one)),
        "two_rows_s": round(rows / statistics.median(two)),
        "ratio": round(statistics.median(one) / statistics.median(two), 2),
        "seconds": {"one": [round(s, 2) for s in one], "two": [round(s, 2) for s in two]},
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
