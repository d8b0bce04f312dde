"""A job on a real Ray of this machine, which lives in an environment beside this one (see the Makefile)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.echo_jobs import read_output, texts, tokenizer_dir, write

ROOT = Path(__file__).parents[2]
ROWS = 1400
PYTHON = Path(os.environ.get("RAY_VENV", ROOT / ".venv-ray"), "bin", "python")

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
    wait_for_answers(tmp_path, 300, run)
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


def start(folder: Path) -> subprocess.Popen:
    tokenizer_dir()
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "SLOW_ECHO": "0.004",
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    command = [str(PYTHON), "-m", "tests.integrations.ray_script", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_answers(folder: Path, count: int, run: subprocess.Popen) -> None:
    answers = folder / "answers"
    while not answers.exists() or len(answers.read_text().splitlines()) < count:
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
