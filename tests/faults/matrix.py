"""The fault matrix: real jobs, one fault after another, and their rows counted.

``python -m tests.faults.matrix [--short] [--seed N] [FOLDER]``. After each fault, or several, the same job is run again
to its end, and every row of the input must be in the output once; meanwhile another process reads the output as polars
and pyarrow do. Prints a line a kind of fault and the totals; exit code 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from batchinfer.data.commits import FOLDER
from tests.echo_jobs import tokenizer_dir
from tests.faults.stand import Stand, bypass_lock, fail_at, full_disk, limit_files, wait

IN_FLIGHT = 64  # rows that a kill may cost: those that the engine holds, and what is finished between two syncs
WRITE_FAILED = (0, 2, 75)  # 0: it was a clean-up that failed
ROOT = Path(__file__).parents[2]


class Matrix:
    """Counts what the cases do."""

    def __init__(self, root: Path, chance: random.Random, short: bool) -> None:
        self.root, self.chance, self.short = root, chance, short
        self.faults = self.rows = self.again = 0

    def stand(self, **how) -> Stand:
        return Stand(Path(tempfile.mkdtemp(prefix="stand-", dir=self.root)), **how)

    def copy(self, stand: Stand) -> Stand:
        folder = Path(tempfile.mkdtemp(prefix="stand-", dir=self.root))
        shutil.copytree(stand.folder, folder, dirs_exist_ok=True, ignore=lambda _, names: {"live"} & set(names))
        return Stand(folder, stand.rows)

    def done(self, stand: Stand, faults: int, retry: bool = False, most: int = IN_FLIGHT) -> None:
        """Run it to its end and look at every row. ``most``: rows that one fault may cost."""
        stand.finish(retry=retry)
        stand.check()
        again = stand.again()
        assert again <= faults * most, f"{again} rows were computed again after {faults} faults"
        self.faults, self.rows, self.again = self.faults + faults, self.rows + stand.rows, self.again + again
        stand.live.unlink()
        shutil.rmtree(stand.folder, ignore_errors=True)

    def pause(self, most: float) -> None:
        time.sleep(self.chance.uniform(0, most))


Case = Callable[[Matrix], None]


# ---- kills


def killed(matrix: Matrix, number: int, kills: int, retry: bool = False, native: bool = False) -> None:
    """A signal at random moments, again and again until the job is done."""
    stand = matrix.stand(native=native, rows=24 if native else 120)
    if retry:
        stand.finish()
    sent = 0
    for _ in range(kills):
        pid = stand.begin(0.02 if native else 0.002, retry=retry)
        if native:  # most of the time the model is being opened
            stand.wait_for("leases/*", pid)
        matrix.pause(1.0 if native else 0.15)
        os.kill(pid, number)
        code = wait(pid)
        sent += code != 0
        if code == 0:
            break
        assert code in (-number, 75), f"exit code {code} after signal {number}: {stand.said()[-500:]}"
    matrix.done(stand, sent, retry)


def terminated_twice(matrix: Matrix) -> None:
    """A second SIGTERM ends at once."""
    stand = matrix.stand()
    pid = stand.begin(0.01)
    stand.wait_for("wal/*", pid)
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.05)
    assert wait(pid) == 75
    matrix.done(stand, 2)


# ---- others at the same output


def frozen_with_another_at_the_door(matrix: Matrix) -> None:
    """While a run is stopped by SIGSTOP, a second one is refused; then the first goes on."""
    stand = matrix.stand()
    first = stand.begin()
    stand.wait_for("leases/*", first)
    os.kill(first, signal.SIGSTOP)
    code = wait(stand.begin())
    assert code == 5, f"exit code {code}, and the output is held: {stand.said()[-500:]}"
    os.kill(first, signal.SIGCONT)
    assert wait(first) == 0
    matrix.done(stand, 2)


def frozen_and_overtaken(matrix: Matrix) -> None:
    """Where the lock does not hold, a second run does all the work while the first stands still."""
    stand = matrix.stand()
    first = stand.begin(0.002, bypass_lock)
    stand.wait_for("commits/*.json", first)
    matrix.pause(0.1)
    os.kill(first, signal.SIGSTOP)
    second = wait(stand.begin(0.0, bypass_lock))
    os.kill(first, signal.SIGCONT)
    assert second == 0 and wait(first) in (0, 5, 6, 75), stand.said()[-500:]
    (stand.folder / "answers").unlink()  # two runs that do not know of each other do work twice
    matrix.done(stand, 2)


def without_locks(matrix: Matrix) -> None:
    """Three runs at once and no lock between them."""
    stand = matrix.stand()
    pids = []
    for _ in range(3):
        pids.append(stand.begin(0.001, bypass_lock))
        matrix.pause(0.1)
    for pid in pids:
        code = wait(pid)
        assert code in (0, 5, 75), f"exit code {code}: {stand.said()[-500:]}"
    (stand.folder / "answers").unlink()
    matrix.done(stand, 3)


def retried_without_locks(matrix: Matrix) -> None:
    """Two retries at once and no lock between them."""
    stand = matrix.stand()
    stand.finish()
    pids = [stand.begin(0.002, bypass_lock, retry=True) for _ in range(2)]
    for pid in pids:
        code = wait(pid)
        assert code in (0, 5, 75), f"exit code {code}: {stand.said()[-500:]}"
    shutil.rmtree(stand.folder / "again", ignore_errors=True)
    matrix.done(stand, 2, retry=True)


# ---- the disk


def failing_writes(matrix: Matrix, number: int, once: bool, points: range, retry: bool = False) -> None:
    """At each of some operations on the disk an error."""
    done = matrix.stand() if retry else None
    if done:
        done.finish()
    for point in points:
        stand = matrix.copy(done) if done else matrix.stand()
        arm = partial(fail_at, point, number, stand.out, once)
        code = wait(stand.begin(0.002, arm, retry=retry))
        assert code in WRITE_FAILED, f"exit code {code} at operation {point}: {stand.said()[-500:]}"
        matrix.done(stand, 1, retry, most=stand.rows)  # what the engine answers until the run notices is lost as well


def a_full_disk(matrix: Matrix, times: int) -> None:
    """The output lies on a disk of a few blocks, on which room is made by and by."""
    stand = matrix.stand(out="disk/out")
    if not full_disk(stand.folder / "disk", "96k"):
        return size_limits(matrix, times)
    try:
        filled, size = 0, 96
        while (code := wait(stand.begin(0.0005))) != 0:
            assert code == (75 if filled else code) and code in (2, 75), stand.said()[-500:]
            assert "No space left on device" in stand.said()
            filled, size = filled + 1, size + 48
            os.system(f"mount -o remount,size={size}k '{stand.folder}/disk'")
        assert filled, "the disk was large enough"
        matrix.done(stand, filled)
    finally:
        os.system(f"umount '{stand.folder}/disk'")


def size_limits(matrix: Matrix, times: int) -> None:
    """No file may grow beyond a size, which differs each time."""
    stand = half_done(matrix)
    for _ in range(times):
        (stand.folder / "said").unlink()
        code = wait(stand.begin(0.002, partial(limit_files, matrix.chance.randrange(1000, 4000))))
        assert code in WRITE_FAILED, f"exit code {code}: {stand.said()[-500:]}"
    matrix.done(stand, times + 1)


# ---- torn files


def torn_logs(matrix: Matrix, step: int) -> None:
    """A killed run's log ends at every byte in turn, and has a flipped bit there."""
    stand = half_done(matrix)
    [log, *_] = sorted((stand.control / "wal").iterdir())
    size = log.stat().st_size
    for at in range(0, size + 1, step):
        torn = matrix.copy(stand)
        os.truncate(torn.control / "wal" / log.name, at)
        matrix.done(torn, 1)


def torn_records(matrix: Matrix, step: int) -> None:
    """Commit records, the plan and job.json end at every byte in turn: the run refuses, and what was lost is told."""
    stand = half_done(matrix)
    names = [sorted((stand.control / FOLDER).glob("*.json"))[0], stand.control / "job.json"]
    names.append(stand.control / "plan-000.parquet")
    for path in names:
        whole, faults = path.read_bytes(), 0
        for at in range(0, len(whole), step * (1 if path.parent.name == FOLDER else 16)):
            path.write_bytes(whole[:at])
            code = wait(stand.begin())
            assert code == 6, f"exit code {code} with {path.name} cut at {at}: {stand.said()[-500:]}"
            faults += 1
        path.write_bytes(whole)
        matrix.faults += faults
    matrix.done(stand, 1)


def torn_parts(matrix: Matrix, step: int) -> None:
    """A committed part is cut or gone: never passed over."""
    stand = half_done(matrix)
    [part, *_] = sorted(stand.out.rglob("*.parquet"))
    stand.live.unlink()
    whole = part.read_bytes()
    for at in [*range(0, len(whole), step * 64), None]:
        part.unlink() if at is None else part.write_bytes(whole[:at])
        code = wait(stand.begin(shown=False))
        assert code == 6, f"exit code {code} with a part cut at {at}: {stand.said()[-500:]}"
        matrix.faults += 1
    part.write_bytes(whole)
    matrix.done(stand, 1)


def half_done(matrix: Matrix) -> Stand:
    """A stand whose run was killed with something committed and something logged."""
    while True:
        stand = matrix.stand()
        pid = stand.begin(0.004)
        stand.wait_for(f"{FOLDER}/*.json", pid)
        time.sleep(0.03)
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        if any((stand.control / "wal").iterdir()) and any(stand.out.rglob("*.parquet")):
            return stand
        stand.live.unlink()
        shutil.rmtree(stand.folder)


# ---- the input


def changed_input(matrix: Matrix) -> None:
    """A file of the input is touched, cut, emptied, gone, replaced or joined by another: refused until it is back."""
    stand = half_done(matrix)
    path = stand.folder / "in" / "part=0" / "1.parquet"
    whole, stat = path.read_bytes(), path.stat()
    other, more = (stand.folder / "in" / "part=1" / "2.parquet").read_bytes(), path.with_name("3.parquet")
    changes: list[Callable[[], object]] = [
        lambda: os.utime(path, ns=(1, 1)),
        lambda: path.write_bytes(whole[: len(whole) // 2]),
        lambda: path.write_bytes(b""),
        lambda: path.unlink(),
        lambda: path.write_bytes(other),
        lambda: more.write_bytes(other),
    ]
    for change in changes:
        change()
        code = wait(stand.begin())
        assert code in (2, 4), f"exit code {code}: {stand.said()[-500:]}"
        more.unlink(missing_ok=True)
        path.write_bytes(whole)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    matrix.done(stand, len(changes))


def changed_input_meanwhile(matrix: Matrix) -> None:
    """A file changes while a run is at work: the run ends, and never mixes two versions."""
    stand = matrix.stand()
    path = stand.folder / "in" / "part=1" / "2.parquet"
    whole, stat = path.read_bytes(), path.stat()
    pid = stand.begin(0.01)
    stand.wait_for("leases/*", pid)
    path.write_bytes(whole[:100])
    code = wait(pid)
    assert code in (0, 2, 4, 75), f"exit code {code}: {stand.said()[-500:]}"
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    matrix.done(stand, 1)


# ---- all of them


def cases(short: bool) -> Iterator[tuple[str, int, Case]]:
    """Name, how often, and the case."""
    few, fewer = (1, 1) if short else (20, 5)
    yield "SIGKILL at random moments", few, partial(killed, number=signal.SIGKILL, kills=4 if short else 12)
    yield "SIGTERM at random moments", few, partial(killed, number=signal.SIGTERM, kills=4 if short else 12)
    yield "SIGTERM twice", fewer, terminated_twice
    yield "SIGKILL of a retry", few, partial(killed, number=signal.SIGKILL, kills=4 if short else 8, retry=True)
    yield "SIGTERM of a retry", fewer, partial(killed, number=signal.SIGTERM, kills=4 if short else 8, retry=True)
    yield "SIGSTOP, a second run refused", fewer, frozen_with_another_at_the_door
    yield "SIGSTOP, overtaken without a lock", few, frozen_and_overtaken
    yield "three runs without a lock", few, without_locks
    yield "two retries without a lock", fewer, retried_without_locks
    every = range(1, 140, 29 if short else 1)
    yield "ENOSPC from some operation on", 1, partial(failing_writes, number=errno.ENOSPC, once=False, points=every)
    yield "EIO at one operation", 1, partial(failing_writes, number=errno.EIO, once=True, points=every)
    yield "EIO in a retry", 1, partial(failing_writes, number=errno.EIO, once=False, points=every, retry=True)
    yield "a disk that fills, room made", fewer, partial(a_full_disk, times=3)
    yield "files that may not grow", fewer, partial(size_limits, times=3)
    yield "a log torn at every byte", 1, partial(torn_logs, step=97 if short else 1)
    yield "records torn at every byte", 1, partial(torn_records, step=61 if short else 1)
    yield "parts cut or gone", 1, partial(torn_parts, step=8 if short else 1)
    yield "input changed between runs", fewer, changed_input
    yield "input changed during a run", fewer, changed_input_meanwhile
    if not short:
        yield "SIGKILL, the demo model", 2, partial(killed, number=signal.SIGKILL, kills=6, native=True)
        yield "SIGTERM, the demo model", 2, partial(killed, number=signal.SIGTERM, kills=3, native=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to work; a temporary folder unless given")
    parser.add_argument("--short", action="store_true", help="some of each kind alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    asked = parser.parse_args()
    tokenizer_dir()
    root = Path(tempfile.mkdtemp(prefix="matrix-", dir=asked.folder))
    watch = [sys.executable, "-m", "tests.faults.watch", str(root)]
    watcher = subprocess.Popen(watch, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    matrix, wrong = Matrix(root, random.Random(asked.seed), asked.short), 0
    for name, times, case in cases(asked.short):
        if asked.only not in name:
            continue
        before, again, begun, failure = matrix.faults, matrix.again, time.monotonic(), ""
        for _ in range(times):
            try:
                case(matrix)
            except AssertionError as error:
                wrong, failure = wrong + 1, f"  WRONG: {error}"
        faults, again = matrix.faults - before, matrix.again - again
        seconds = time.monotonic() - begun
        print(f"{name:<36}{faults:>6} faults {again:>6} rows again {seconds:>7.1f} s{failure}", flush=True)
    watcher.terminate()
    looks, replaced, *seen = watcher.communicate()[0].splitlines()
    print(*seen, sep="\n", end="\n" if seen else "")
    lost = "0 lost, 0 doubled" if not wrong else f"{wrong} cases WRONG"
    print(f"{matrix.faults:,} faults, {matrix.rows:,} rows checked, {lost}, {matrix.again:,} computed again")
    print(
        f"a reader looked {int(looks):,} times, and {replaced} times again as a retry had replaced a part, "
        f"and saw {len(seen)} times what must not be"
    )
    shutil.rmtree(root, ignore_errors=True)
    return bool(wrong or seen)


if __name__ == "__main__":
    sys.exit(main())
