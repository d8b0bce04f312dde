"""The native engine in its process, hurt on purpose: by rows, by signals, by a second run. Each row comes out once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from tests.backends.test_process import gone
from tests.echo_jobs import read_output, write
from tests.engine.tiny import make_model
from tests.faults.native import MARK

ROOT = Path(__file__).parents[2]
ROWS = 120
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama")


def make_input(folder: Path, poison: set[int] = frozenset()) -> None:
    texts = [f"row {i}{MARK if i in poison else ''} has {i * i} words" for i in range(ROWS)]
    write(folder / "in.parquet", pa.table({"id": range(ROWS), "text": texts}))


def start(model: Path, folder: Path, engine: str, *settings: str) -> subprocess.Popen:
    """A run, whose engine is open, unless it is over already."""
    command = [sys.executable, "-m", "tests.faults.native", str(model), str(folder), engine, *settings]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    return run


def finish(run: subprocess.Popen) -> tuple[int, str]:
    """Wait for it: a run never hangs, shows no traceback, and leaves no engine."""
    said, told = run.communicate(timeout=120)
    assert "Traceback" not in told, told
    return run.returncode, said + told


def engines(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "engines").read_text().split()]


def signal_engine(folder: Path, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(engines(folder)[-1], number)


def wait_for_commits(folder: Path, count: int) -> None:
    end = time.monotonic() + 60
    while len(list((folder / "out.batchinfer").glob("commits/*.json"))) < count:
        assert time.monotonic() < end, "the run gets nowhere"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> pa.Table:
    folder = tmp_path_factory.mktemp("undisturbed")
    make_input(folder)
    code, said = finish(start(model, folder, "plain"))
    assert code == 0, said
    out = read_output(folder)
    assert out["id"].to_pylist() == list(range(ROWS)) and out["error"].null_count == ROWS
    return out


def test_rows_that_kill_the_engine_are_set_aside_and_all_others_come_out_as_ever(model, undisturbed, tmp_path):
    poison = {3, 70}
    make_input(tmp_path, poison)
    code, said = finish(start(model, tmp_path, "poisoned"))
    assert code == 0, said
    assert "rows set aside" in said and "engine restarted" in said
    out, plain = read_output(tmp_path).to_pylist(), undisturbed.to_pylist()
    assert {row["id"] for row in out if row["error"]} == poison
    for row in poison:
        assert "the engine died with this row alone: signal 11 (SIGSEGV)" in out[row]["error"]
    assert [row for row in out if row["id"] not in poison] == [row for row in plain if row["id"] not in poison]
    assert all(map(gone, engines(tmp_path)))


def test_engines_killed_at_random_moments_cost_no_row_and_change_none(model, undisturbed, tmp_path):
    make_input(tmp_path)
    run, chance, kills = start(model, tmp_path, "plain", "engine.profile.batch_size=4"), random.Random(6), 0
    while run.poll() is None and kills < 3:
        time.sleep(chance.uniform(0.0, 0.3))
        if len(engines(tmp_path)) > kills:
            signal_engine(tmp_path, signal.SIGKILL)
            kills += 1
    code, said = finish(run)
    assert code == 0, said
    assert read_output(tmp_path).equals(undisturbed) and kills >= 2
    print(f"engines killed {kills}, rows {ROWS}, lost 0, doubled 0, blamed 0")


def test_a_frozen_engine_is_replaced_and_a_frozen_run_blames_nobody(model, undisturbed, tmp_path):
    make_input(tmp_path)
    settings = ("engine.profile.batch_size=2", "limits.engine_timeout=3s", "sampling.max_tokens=24")
    run = start(model, tmp_path, "plain", *settings)
    wait_for_commits(tmp_path, 1)
    run.send_signal(signal.SIGSTOP)
    second = start(model, tmp_path, "plain", *settings)
    code, said = finish(second)
    assert code == 5 and f"process {run.pid} on" in said, "frozen or not, it holds the output"
    time.sleep(3.5)
    run.send_signal(signal.SIGCONT)
    before = len(engines(tmp_path))
    wait_for_commits(tmp_path, 2)
    assert len(engines(tmp_path)) == before, "what was silent was the run, not the engine"
    signal_engine(tmp_path, signal.SIGSTOP)
    code, said = finish(run)
    assert code == 0 and "no sign of life for 3s" in said, said
    out = read_output(tmp_path)
    assert out["id"].to_pylist() == list(range(ROWS)) and out["error"].null_count == ROWS
    assert all(map(gone, engines(tmp_path)))


def test_a_second_stop_while_a_dead_engine_comes_back_ends_at_once_and_then_a_kill_leaves_no_engine(
    model, undisturbed, tmp_path
):
    make_input(tmp_path)
    slow = "engine.profile.batch_size=2"
    run = start(model, tmp_path, "plain", slow)
    wait_for_commits(tmp_path, 1)
    signal_engine(tmp_path, signal.SIGKILL)
    for _ in range(2):
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
    code, said = finish(run)
    assert code == 75, said
    assert all(map(gone, engines(tmp_path)))
    run = start(model, tmp_path, "plain", slow)
    run.kill()
    run.communicate()
    assert all(map(gone, engines(tmp_path)))
    code, said = finish(start(model, tmp_path, "plain"))
    assert code == 0, said
    assert read_output(tmp_path).equals(undisturbed)
