"""Runs a small job again and again, each time killed at the next operation on the disk, and then to its end.

``python -m tests.faults.crash_points FOLDER [append|shard]``: one folder a crash point, FOLDER/<n>/, which the caller
looks at. With ``append`` the run that is killed is one that takes up a second input file after a first run was
complete; with ``shard`` it is one of two shards, and the other one works before it is run again. It forks, so it must
be a process of its own, in which nothing has run yet. Prints the number of crash points.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from batchinfer.backends.echo import EchoBackend
from tests.echo_jobs import echo_job, run_echo, texts, tokenizer_dir, write

OPERATIONS = ("write", "fsync", "link", "replace", "unlink")
UNITS, UNIT_ROWS = 3, 8


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


def run_in_child(folder: Path, point: int | None, shard: str | None = None) -> int:
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        if point is not None:
            die_at(point)
        how = {"checkpoint__unit_rows": UNIT_ROWS, "checkpoint__sync_rows": 2, "input__on_change": "append"}
        if shard is not None:
            how["job__shard"] = shard
        os._exit(run_echo(echo_job(folder, folder / "in", **how), Pausing).exit_code)
    finally:
        os._exit(1)


def main() -> None:
    root, point, status, append = Path(sys.argv[1]), 0, signal.SIGKILL, "append" in sys.argv
    tokenizer_dir()
    while status == signal.SIGKILL:
        folder = root / f"{point:03}"
        write(folder / "in" / "b.parquet", texts(UNITS * UNIT_ROWS))
        if append:
            run_in_child(folder, None)
            write(folder / "in" / "a.parquet", texts(UNITS * UNIT_ROWS))
        shards = ("0/2", "1/2") if "shard" in sys.argv else (None,)
        status = run_in_child(folder, point + 1, shards[0])
        if status not in (0, signal.SIGKILL) or any([run_in_child(folder, None, shard) for shard in reversed(shards)]):
            sys.exit(f"crash point {point}: no way on")
        point += 1
    print(point - 1)


if __name__ == "__main__":
    main()
