"""A job on a real Ray of this machine, which lives in an environment beside this one (see the Makefile)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import batchinfer
from tests.echo_jobs import read_output, texts, tokenizer_dir, write
from tests.engine.tiny import make_model
from tests.integrations.ray_script import stages_job

ROOT = Path(__file__).parents[2]
ROWS = 1400
PYTHON = Path(os.environ.get("RAY_VENV", ROOT / ".venv-ray"), "bin", "python")

RANK = b"batchinfer.engine.worker\0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: `make test-ray` makes it"),
]


LONG = pytest.mark.skipif("RAY_ALL" not in os.environ, reason="takes a minute: `make test-ray`")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="an engine is killed"),
        pytest.param(signal.SIGTERM, id="the run is stopped and run again", marks=LONG),
    ],
)
def test_two_engines_answer_every_row_once(tmp_path, number):
    write(tmp_path / "in" / "a.parquet", texts(ROWS), row_group_size=150)
    run = start(tmp_path)
    answers = tmp_path / "answers"
    wait_for(lambda: answers.exists() and len(answers.read_text().splitlines()) >= 300, run)
    engines = [int(pid) for pid in (tmp_path / "answers.pids").read_text().split()]
    assert len(engines) == 2
    os.kill(engines[0] if number == signal.SIGKILL else run.pid, number)
    said, errors = run.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert run.returncode == 75 and json.loads(said.splitlines()[-1])["reason"] == "SIGTERM", errors
        run = start(tmp_path)
        said, errors = run.communicate(timeout=120)
    else:
        assert "is lost" in errors and len((tmp_path / "answers.pids").read_text().split()) == 3, errors
    assert run.returncode == 0, errors
    told = json.loads(said.splitlines()[-1])
    assert told["state"] == "complete" and told["job"]["rows"] == ROWS
    assert read_output(tmp_path)["id"].to_pylist() == list(range(ROWS))
    assert (tmp_path / "out.batchinfer" / "_SUCCESS").exists()
    answered = Counter((tmp_path / "answers").read_text().splitlines())
    again = sum(answered.values()) - len(answered)
    print(f"rows {ROWS}, lost 0, doubled 0, computed again {again}")
    assert len(answered) == ROWS and again <= (64 if number == signal.SIGKILL else 0)


@LONG
def test_an_engine_over_two_nodes_comes_back_when_a_rank_is_killed_and_says_what_one_process_says(tmp_path):
    write(tmp_path / "in" / "a.parquet", texts(ROWS), row_group_size=150)
    make_model(tmp_path / "model", "llama")
    run = start(tmp_path)
    wait_for(lambda: len(list((tmp_path / "out.batchinfer" / "commits").glob("*.json"))) > 4, run)
    ranks = [path.parent for path in Path("/proc").glob("*/cmdline") if path.read_bytes().endswith(RANK)]
    assert len(ranks) == 2
    os.kill(int(ranks[1].name), signal.SIGKILL)
    said, errors = run.communicate(timeout=180)
    assert run.returncode == 0, errors
    told = json.loads(said.splitlines()[-1])
    assert told["state"] == "complete" and told["job"]["rows"] == ROWS and told["load"]["details"]["restarts"] == 1
    here = stages_job(tmp_path, output__path=str(tmp_path / "here" / "out"), engine__isolation="none")
    batchinfer.run(here.changed({"engine.pp": 1}), progress=False)
    assert read_output(tmp_path).equals(read_output(tmp_path / "here"))


def start(folder: Path) -> subprocess.Popen:
    tokenizer_dir()
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "SLOW_ECHO": "0.004",
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    command = [str(PYTHON), "-m", "tests.integrations.ray_script", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(happened: Callable[[], bool], run: subprocess.Popen) -> None:
    while not happened():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
