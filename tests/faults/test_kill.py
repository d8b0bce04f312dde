"""Kill a run at random moments until it is done: every row once, in order, equal to an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from tests.echo_jobs import read_output, texts, write

ROWS = (500, 0, 900, 1)  # of the input files; the second is empty
ROOT = Path(__file__).parents[2]


def make_input(folder: Path) -> pa.Table:
    total = sum(ROWS)
    table = texts(total).append_column("number", pa.array(range(total), pa.int32()))
    table = table.set_column(1, "text", pa.array([None if i % 97 == 13 else t for i, t in enumerate(table["text"])]))
    begin = 0
    for index, rows in enumerate(ROWS):
        write(folder / "in" / f"part={index}" / "x.parquet", table.slice(begin, rows), row_group_size=150)
        begin += rows
    return table


def launch(folder: Path, seconds: float, *shard: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.faults.job", str(folder), str(seconds), *shard]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start(folder: Path, seconds: float, *shard: str) -> subprocess.Popen:
    process = launch(folder, seconds, *shard)
    process.stdout.readline()  # "begun", or the end of a run that had nothing to ask
    return process


def finish(process: subprocess.Popen) -> int:
    """Wait for it; a run must never hang, nor show a traceback."""
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said, said
    return process.returncode


def parts_by_unit(folder: Path) -> dict[tuple[str, str], bytes]:
    """The parts' bytes, by partition and unit; an attempt's number is only in the name."""
    return {(p.parent.name, p.name.split("-")[1]): p.read_bytes() for p in (folder / "out").rglob("*.parquet")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[tuple[str, str], bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    make_input(folder)
    assert finish(start(folder, 0.0)) == 0
    return parts_by_unit(folder)


def check(folder: Path, table: pa.Table, undisturbed) -> None:
    out = read_output(folder)
    assert out.num_rows == table.num_rows, f"{table.num_rows - out.num_rows} rows lost"
    assert out.select(table.column_names).equals(table.cast(out.select(table.column_names).schema))
    parts = parts_by_unit(folder)
    assert parts.keys() == undisturbed.keys()
    for key, part in parts.items():
        assert part == undisturbed[key], key


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_and_doubles_nothing(tmp_path, undisturbed):
    table = make_input(tmp_path)
    chance, kills = random.Random(20), 24
    for _ in range(kills):
        process = start(tmp_path, 0.001)
        time.sleep(chance.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed often enough"
        seen = read_output_as_it_is(tmp_path)
        assert len(seen) == len(set(seen)), "what is visible in between is never doubled nor half-written"
    assert finish(start(tmp_path, 0.0)) == 0
    answered = Counter((tmp_path / "answers").read_text().splitlines())
    computed, again = len(answered), sum(answered.values()) - len(answered)
    check(tmp_path, table, undisturbed)
    print(f"SIGKILLs {kills}, rows {table.num_rows}, lost 0, doubled 0, computed again {again}")
    assert computed == table.num_rows - table["text"].null_count
    assert again <= kills * 64, "at most what was in flight and what waited for the log's next sync"


def read_output_as_it_is(folder: Path) -> list[int]:
    import polars as pl

    root = folder / "out"
    return pl.read_parquet(root)["id"].to_list() if any(root.rglob("*.parquet")) else []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["", "append", "shard", "retry"])
def test_a_crash_at_each_single_disk_operation_loses_and_doubles_nothing(tmp_path, case):
    command = [sys.executable, "-m", "tests.faults.crash_points", str(tmp_path), *filter(None, [case])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    points = int(done.stdout)
    print(f"crash points {points}")
    assert points > 40
    outputs = [read_output(tmp_path / f"{point:03}") for point in range(points + 1)]
    assert all(output.equals(outputs[-1]) for output in outputs)
    assert outputs[-1]["id"].to_pylist() == list(range(24)) * (1 + (case == "append"))
    assert outputs[-1]["completion_tokens"].to_pylist()[:4] == ([5, 3, 5, 3] if case == "retry" else [3] * 4)
    for point in range(points + 1):
        assert (tmp_path / f"{point:03}" / "out.batchinfer" / "_SUCCESS").exists()


def test_sigterm_drains_exits_75_and_computes_no_row_twice(tmp_path, undisturbed):
    table = make_input(tmp_path)
    chance, codes = random.Random(5), []
    while not codes or codes[-1] == 75:
        process = start(tmp_path, 0.001)
        time.sleep(chance.uniform(0.05, 0.4))
        process.send_signal(signal.SIGTERM)
        codes.append(finish(process))
    assert codes[-1] in (0, -signal.SIGTERM) and codes.count(75) >= 2
    if codes[-1] != 0:  # the last signal came after the run had put the handlers back
        assert finish(start(tmp_path, 0.0)) == 0
    check(tmp_path, table, undisturbed)
    answered = Counter((tmp_path / "answers").read_text().splitlines())
    assert set(answered.values()) == {1}


def test_a_second_run_is_refused_while_the_first_lives_and_welcome_when_it_was_killed(tmp_path, undisturbed):
    table = make_input(tmp_path)
    first = start(tmp_path, 0.01)
    second = start(tmp_path, 0.0)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 5 and f"process {first.pid} on" in said
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert finish(start(tmp_path, 0.0)) == 0
    check(tmp_path, table, undisturbed)


def test_two_shards_at_once_one_of_them_killed_and_run_again(tmp_path, undisturbed):
    table = make_input(tmp_path)
    first, second = (launch(tmp_path, 0.006, shard) for shard in ("0/2", "1/2"))
    for process in (first, second):
        assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert second.returncode == -signal.SIGKILL and first.poll() is None
    refused = launch(tmp_path, 0.0)  # by itself: it holds what is free until it finds what is not
    _, said = refused.communicate(timeout=60)
    assert refused.returncode == 5 and "/2: process" in said
    again = launch(tmp_path, 0.0, "1/2")
    assert (finish(again), finish(first)) == (0, 0)
    check(tmp_path, table, undisturbed)
    assert (tmp_path / "out.batchinfer" / "_SUCCESS").exists()
    answered = Counter((tmp_path / "answers").read_text().splitlines())
    repeated = sum(answered.values()) - len(answered)
    print(f"rows {table.num_rows}, lost 0, doubled 0, computed again {repeated}")
    assert len(answered) == table.num_rows - table["text"].null_count
    assert repeated <= 64, "at most what was in flight and what waited for the log's next sync"


def test_a_run_that_was_frozen_and_goes_on_does_no_harm(tmp_path, undisturbed):
    table = make_input(tmp_path)
    first = start(tmp_path, 0.0005)
    for _ in range(5):
        first.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        first.send_signal(signal.SIGCONT)
        time.sleep(0.05)
    assert finish(first) == 0
    check(tmp_path, table, undisturbed)


@pytest.mark.slow
def test_logs_torn_at_many_bytes_cost_rows_of_the_last_batch_and_nothing_else(tmp_path, undisturbed):
    table = make_input(tmp_path)
    chance = random.Random(3)
    for _ in range(8):
        process = start(tmp_path, 0.001)
        time.sleep(0.12)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for log in (tmp_path / "out.batchinfer" / "wal").iterdir():
            size = log.stat().st_size
            os.truncate(log, chance.randrange(size + 1))
    for folder, name in (("commits", "000003.json.4242.tmp"), ("staged", "000003.1"), (".", "job.json.tmp")):
        (tmp_path / "out.batchinfer" / folder / name).write_bytes(b"")
    assert finish(start(tmp_path, 0.0)) == 0
    check(tmp_path, table, undisturbed)
    assert [p.name for p in (tmp_path / "out.batchinfer" / "staged").iterdir()] == []
