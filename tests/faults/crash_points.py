"""Runs a small job again and again, each time killed at the next operation on the disk, and then to its end.

``python -m tests.faults.crash_points FOLDER [append|shard|retry]``: one folder a crash point, FOLDER/<n>/, which the
caller looks at. With ``append`` the run that is killed is one that takes up a second input file after a first run was
complete; with ``shard`` it is one of two shards, and the other one works before it is run again; with ``retry`` it is a
retry of half of the rows. After each kill what a reader sees is checked: no row twice, each part whole and all of one
time. It forks, so it must be a process of its own, in which nothing has run yet. Prints the number of crash points.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import polars  # noqa: F401  (once, and not in each child)

from batchinfer import retrier
from batchinfer.backends.echo import EchoBackend
from batchinfer.job import Job
from tests.echo_jobs import echo_job, run_echo, texts, tokenizer_dir, write

OPERATIONS = ("write", "fsync", "link", "replace", "unlink")
UNITS, UNIT_ROWS = 3, 8
AT_ONCE = 4  # points: runs of so few rows mostly wait
REACHED, ENDED = 40, 41  # exit codes
OLD, NEW = 3, 5  # tokens of a completion before and after a retry


class Pausing(EchoBackend):
    """Pauses within every unit, so that its rows are logged."""

    def generate(self, requests):
        for completion in super().generate(requests):
            if completion.key[1] == UNIT_ROWS // 2:
                threading.Event().wait(0.03)
            yield completion


def die_at(point: int) -> None:
    """Have SIGKILL strike before the ``point``-th operation; half of the bytes of a write are written."""
    lock = threading.Lock()
    count = 0

    def armed(name: str):
        plain = getattr(os, name)

        def operation(*args, **kwargs):
            nonlocal count
            with lock:
                count += 1
                if count == point:
                    if name == "write":
                        plain(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        setattr(os, name, operation)

    for name in OPERATIONS:
        armed(name)


def begin(act: Callable[[Path], int], folder: Path, point: int | None = None) -> int:
    """A child that does something and ends, or dies on the way."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if point is not None:
            die_at(point)
        os._exit(act(folder))
    finally:
        os._exit(1)


def in_child(act: Callable[[Path], int], folder: Path, point: int | None = None) -> int:
    """The status with which it ended."""
    return os.waitpid(begin(act, folder, point), 0)[1]


def job(folder: Path, **how: str) -> Job:
    how |= {"checkpoint__unit_rows": UNIT_ROWS, "checkpoint__sync_rows": 2, "input__on_change": "append"}
    return echo_job(folder, folder / "in", sampling__max_tokens=OLD, **how)


def run(folder: Path, **how: str) -> int:
    return run_echo(job(folder, **how), Pausing).exit_code


def retry(folder: Path) -> int:
    with mock.patch("batchinfer.retrier.open_backend", lambda job, progress: Pausing(tokenizer_dir())):
        settings = {"sampling.max_tokens": NEW}
        return retrier.retry(job(folder), "id % 2 = 0", settings, progress=False).exit_code


def look(folder: Path) -> int:
    """0 if what a reader sees is sound: no row twice, every part whole, and all of it of one time."""
    import pyarrow.parquet as pq

    parts = [pq.read_table(path, partitioning=None) for path in sorted((folder / "out").rglob("*.parquet"))]
    ids = [row for part in parts for row in part["id"].to_pylist()]
    of_one_time = all(len({*part["completion_tokens"].to_pylist()[::2]}) == 1 for part in parts)
    most = 1 + (folder / "in" / "a.parquet").exists()
    return not (of_one_time and all(ids.count(row) <= most for row in ids))


ACTS = {  # case → what is killed, and what goes on afterwards
    "": (run, [run]),
    "append": (run, [run]),
    "shard": (partial(run, job__shard="0/2"), [partial(run, job__shard=shard) for shard in ("1/2", "0/2")]),
    "retry": (retry, [retry]),
}


def at_point(case: str, point: int, folder: Path) -> int:
    """REACHED if a run was killed there, and the next one went on; ENDED if it ended before."""
    act, then = ACTS[case]
    write(folder / "in" / "b.parquet", texts(UNITS * UNIT_ROWS))
    if case in ("append", "retry"):
        in_child(run, folder)
    if case == "append":
        write(folder / "in" / "a.parquet", texts(UNITS * UNIT_ROWS))
    status = in_child(act, folder, point)
    if status not in (0, signal.SIGKILL) or any([in_child(each, folder) for each in (look, *then)]):
        return 1
    return REACHED if status else ENDED


def main() -> None:
    root, case, reached, codes = Path(sys.argv[1]), "".join(sys.argv[2:]), 0, []
    tokenizer_dir()
    while ENDED not in codes:
        points = range(reached, reached + AT_ONCE)
        children = [begin(partial(at_point, case, point + 1), root / f"{point:03}") for point in points]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if wrong := [point for point, code in zip(points, codes) if code not in (REACHED, ENDED)]:
            sys.exit(f"crash point {wrong[0]}: no way on")
        reached += [*codes, ENDED].index(ENDED)
    print(reached)


if __name__ == "__main__":
    main()
