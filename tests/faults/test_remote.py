"""Whole jobs from and to an object store whose requests fail, killed, frozen and in competition: every row once."""

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

from batchinfer.data import bucket as module
from batchinfer.errors import DriftError, JobError, StoreError
from tests.echo_jobs import echo_job, retry_echo, run_echo, texts
from tests.faults.test_kill import ROOT, finish
from tests.s3 import at_random

ROWS = (260, 0, 140)  # of the input's objects


@pytest.fixture
def table(bucket) -> pa.Table:
    """Put the input there. Returns all its rows."""
    whole, begin = texts(sum(ROWS)), 0
    for index, rows in enumerate(ROWS):
        bucket.put(f"in/day={index}/x.parquet", whole.slice(begin, rows), row_group_size=60)
        begin += rows
    return whole


def check(bucket, table: pa.Table) -> None:
    """Every row once, in the input's order, and nothing but parts; told by a reader of the folder."""
    out = bucket.read()
    assert out.select(table.column_names).equals(table.cast(out.select(table.column_names).schema))
    assert all(key.rpartition("/")[2].startswith("part-") for key in bucket.names("out"))
    assert not [key for key in bucket.names("out.batchinfer") if "/staged/" in key or key.endswith("/lock")]


def start(folder: Path, bucket, seconds: float, *how: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.faults.remote_job", str(folder), str(seconds)]
    command += [f"{bucket.url}/in", f"{bucket.url}/out", *how]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **bucket.environment}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # "begun", or the end of a run that had nothing to ask
    return process


def job(bucket, folder: Path, **changes):
    return echo_job(folder, **{"input__path": f"{bucket.url}/in", "output__path": f"{bucket.url}/out", **changes})


@pytest.mark.parametrize("seed", range(3))
def test_faults_at_random_are_not_noticed(tmp_path, bucket, table, seed):
    bucket.proxy.fault = at_random(seed, 0.12)
    assert run_echo(job(bucket, tmp_path)).exit_code == 0
    print(f"faults injected {dict(bucket.proxy.faults)}")
    check(bucket, table)
    assert bucket.proxy.faults.total() >= 5 and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_sigkill_at_random_moments_amid_faults_loses_and_doubles_nothing(tmp_path, bucket, table):
    chance, kills = random.Random(7), 8
    bucket.proxy.fault = at_random(7, 0.05, ("500", "503", "reset", "lost", "cut"))
    for _ in range(kills):
        process = start(tmp_path, bucket, 0.002)
        time.sleep(chance.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen = bucket.read()
        assert len(seen) == len(set(seen["id"].to_pylist())) if len(seen) else True
    assert finish(start(tmp_path, bucket, 0.0)) == 0
    answered = Counter((tmp_path / "answers").read_text().splitlines())
    again = sum(answered.values()) - len(answered)
    print(f"SIGKILLs {kills}, faults {bucket.proxy.faults.total()}, rows {table.num_rows}, computed again {again}")
    check(bucket, table)
    assert len(answered) == table.num_rows
    assert again <= kills * 64, "at most what was in flight and what waited for the log's next put"


def lengths(bucket) -> dict[int, int]:
    """Tokens of each row's completion, by its id, of which there is one each."""
    out = bucket.read()
    told = dict(zip(out["id"].to_pylist(), out["completion_tokens"].to_pylist()))
    assert len(told) == len(out)
    return told


@pytest.mark.parametrize("seed", range(2))
def test_a_retry_amid_faults_answers_the_chosen_rows_again_and_no_others(tmp_path, bucket, table, seed):
    run_echo(job(bucket, tmp_path, sampling__max_tokens=8))
    bucket.proxy.fault = at_random(seed, 0.12)
    retried = retry_echo(job(bucket, tmp_path, sampling__max_tokens=8), "id % 3 = 0", {"sampling.max_tokens": 9})
    assert retried.retry["superseded"] == len(range(0, table.num_rows, 3))
    bucket.proxy.fault = lambda method, path: None
    check(bucket, table)
    assert lengths(bucket) == {row: 9 if row % 3 == 0 else 8 for row in range(table.num_rows)}
    assert bucket.proxy.faults.total() >= 5


@pytest.mark.slow
def test_a_retry_that_is_killed_amid_faults_shows_each_row_as_it_was_or_as_it_is(tmp_path, bucket, table):
    assert finish(start(tmp_path, bucket, 0.0)) == 0
    before, chance, kills = lengths(bucket), random.Random(3), 6
    (tmp_path / "answers").unlink()
    bucket.proxy.fault = at_random(3, 0.05, ("500", "503", "reset", "lost", "cut"))
    for _ in range(kills):
        process = start(tmp_path, bucket, 0.004, "retry")
        time.sleep(chance.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen = lengths(bucket)
        assert seen.keys() == before.keys()
        assert all(tokens in (before[row], 9 if row % 3 == 0 else before[row]) for row, tokens in seen.items())
    assert finish(start(tmp_path, bucket, 0.0, "retry")) == 0
    answered = Counter((tmp_path / "answers").read_text().splitlines())
    again = sum(answered.values()) - len(answered)
    print(f"SIGKILLs {kills}, faults {bucket.proxy.faults.total()}, rows {len(answered)}, computed again {again}")
    check(bucket, table)
    assert lengths(bucket) == {row: 9 if row % 3 == 0 else tokens for row, tokens in before.items()}
    assert len(answered) == len(range(0, table.num_rows, 3)) and again <= kills * 64


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_lives_and_welcome_when_it_was_killed(tmp_path, bucket, table):
    first = start(tmp_path, bucket, 0.1)
    second = start(tmp_path, bucket, 0.0)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 5 and f"process {first.pid} on" in said
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert finish(start(tmp_path, bucket, 0.0)) == 0
    check(bucket, table)


@pytest.mark.slow
def test_runs_that_no_lease_keeps_apart_still_show_every_row_once(tmp_path, bucket, table):
    runs = [start(tmp_path, bucket, 0.001 * i, "unlocked") for i in (1, 2, 1)]
    codes = [finish(run) for run in runs]
    assert 0 in codes
    assert finish(start(tmp_path, bucket, 0.0)) == 0
    check(bucket, table)


def test_trouble_that_stays_stops_the_run_with_75_and_the_next_goes_on(tmp_path, bucket, table, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    commits = []

    def down(method, path):
        commits.extend([path] if "/commits/" in path and method == "PUT" else [])
        return "503" if len(commits) > 3 else None

    bucket.proxy.fault = down
    with pytest.raises(StoreError, match="cannot .* s3://.*: status 503.*run the same command again") as raised:
        run_echo(job(bucket, tmp_path))
    assert raised.value.exit_code == 75
    bucket.proxy.fault = lambda method, path: None
    assert 0 < len(bucket.read()) < len(table)
    assert run_echo(job(bucket, tmp_path)).exit_code == 0
    check(bucket, table)


def test_refused_access_ends_with_2_and_shows_no_secret(tmp_path, bucket, table):
    bucket.proxy.fault = lambda method, path: "403" if "/commits/" in path else None
    with pytest.raises(JobError, match="access denied") as raised:
        run_echo(job(bucket, tmp_path))
    assert raised.value.exit_code == 2 and "secret" not in str(raised.value)
    bucket.proxy.fault = lambda method, path: None
    assert not [key for key in bucket.names() if b"secret" in bucket.get(key)]


def test_an_object_that_changed_is_drift_as_a_file_is(tmp_path, bucket, table):
    run_echo(job(bucket, tmp_path))
    before = bucket.get("in/day=0/x.parquet")
    bucket.put("in/day=0/x.parquet", before[:-12] + b"x" + before[-11:])
    with pytest.raises(DriftError, match="in/day=0/x.parquet was changed since the output was begun: tag was"):
        run_echo(job(bucket, tmp_path))
    bucket.put("in/day=0/x.parquet", before)  # the same bytes are the same object
    run_echo(job(bucket, tmp_path))
    bucket.delete("in/day=0/x.parquet")
    with pytest.raises(DriftError, match="was there when the output was begun and is gone"):
        run_echo(job(bucket, tmp_path))


def test_an_object_that_changes_while_it_is_read_ends_the_run(tmp_path, bucket):
    big = texts(200_000)
    bucket.put("in/x.parquet", big, row_group_size=10_000)

    def change(method, path):
        if path.endswith("/commits/000001.json"):
            bucket.put("in/x.parquet", big, row_group_size=9_000)

    bucket.proxy.fault = change
    with pytest.raises(DriftError, match=r"s3://.*/in/x.parquet changed while it was read"):
        run_echo(job(bucket, tmp_path, checkpoint__unit_rows=2000))
    assert bucket.read()["id"].to_pylist() == list(range(len(bucket.read())))


@pytest.mark.parametrize("source, target", [("disk", "bucket"), ("bucket", "disk")])
def test_input_and_output_may_lie_in_different_places(tmp_path, bucket, table, source, target):
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "x.parquet")
    places = {"disk": tmp_path.as_uri(), "bucket": bucket.url}
    done = run_echo(job(bucket, tmp_path, input__path=f"{places[source]}/in", output__path=f"{places[target]}/out"))
    out = bucket.read() if target == "bucket" else pq.read_table(tmp_path / "out")
    assert done.exit_code == 0 and out["id"].to_pylist() == list(range(sum(ROWS)))


@pytest.mark.slow
def test_a_frozen_run_is_taken_over_from_another_machine_and_does_no_harm_when_it_thaws(tmp_path, bucket, table):
    first = start(tmp_path, bucket, 0.01)
    time.sleep(0.8)
    first.send_signal(signal.SIGSTOP)
    code = 5
    while code == 5:  # refused until the lease is stale
        code = finish(start(tmp_path, bucket, 0.001, "elsewhere"))
    assert code == 0
    first.send_signal(signal.SIGCONT)
    assert finish(first) == 5
    assert finish(start(tmp_path, bucket, 0.0)) == 0  # clears what the first had staged
    check(bucket, table)


@pytest.mark.slow
def test_shards_share_an_output_each_of_them_once_and_go_on_when_they_were_killed(tmp_path, bucket, table):
    killed = [start(tmp_path, bucket, 0.1, f"{shard}/2") for shard in (0, 1)]
    third = start(tmp_path, bucket, 0.0, "1/2")
    _, said = third.communicate(timeout=60)
    assert third.returncode == 5 and "shard 1/2" in said
    for run in killed:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert [finish(run) for run in [start(tmp_path, bucket, 0.001, f"{shard}/2") for shard in (0, 1)]] == [0, 0]
    assert finish(start(tmp_path, bucket, 0.0)) == 0
    check(bucket, table)
