"""Whole jobs through the command line and the native engine, as a user runs them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from tests.engine.tiny import make_model

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny random model: its words mean nothing, its engine is the real one, and it loads at once."""
    return make_model(tmp_path_factory.mktemp("model"), "llama")


def command(model: Path, output: Path, source: str = "sample_data/prompts.parquet", *more: str) -> list[str]:
    flags = ["-i", source, "-o", str(output), "-m", str(model), "--template", "{{ prompt }}", "--max-tokens", "24"]
    settings = ["--set", "engine.dtype=float32", "--set", "checkpoint.unit_rows=32"]
    return [sys.executable, "-m", "batchinfer", "run", *flags, *settings, *more]


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def parts(output: Path) -> dict[str, bytes]:
    return {p.name.rsplit("-", 1)[0]: p.read_bytes() for p in output.glob("*.parquet")}


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(model, output)
    assert done.returncode == 0, done.stderr
    assert "230 rows" in done.stdout and "tok/s" in done.stdout and str(output) in done.stdout
    return output


def test_every_row_comes_out_once_and_in_order_with_its_columns(undisturbed):
    source, out = pl.read_parquet(ROOT / "sample_data/prompts.parquet"), pl.read_parquet(undisturbed)
    assert out.select(source.columns).equals(source)
    assert out.columns[len(source.columns) :] == [
        "completion",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "error",
    ]
    fits = out.filter(pl.col("error").is_null())
    assert set(fits["finish_reason"]) <= {"stop", "length"} and fits["completion_tokens"].max() == 24
    long = out.filter(pl.col("error").is_not_null())
    assert 0 < len(long) < 115 and set(long["finish_reason"]) == {"error"}  # the tiny model takes 512 bytes
    summary = json.loads((Path(f"{undisturbed}.batchinfer") / "summary.json").read_text())
    assert summary["job"]["rows"] == 230 and summary["load"]["steps"] > 24


def test_a_second_run_says_that_the_job_is_complete(model, undisturbed):
    runs = Path(f"{undisturbed}.batchinfer", "runs")
    before, told = parts(undisturbed), sorted(runs.iterdir())
    again = run(model, undisturbed)
    assert again.returncode == 0 and "complete" in again.stdout
    assert parts(undisturbed) == before
    assert sorted(runs.iterdir()) == told, "it opened the engine"


def test_killed_and_resumed_the_output_is_equal_to_the_byte(model, undisturbed, tmp_path):
    chance, output = random.Random(1), tmp_path / "out"
    for _ in range(4):
        process = subprocess.Popen(command(model, output), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        while process.poll() is None and not list(Path(f"{output}.batchinfer").glob("wal/*")):
            time.sleep(0.05)  # until the engine has begun
        time.sleep(chance.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = run(model, output)
    assert done.returncode == 0, done.stderr
    assert parts(output) == parts(undisturbed)


def test_sigterm_drains_and_exits_75(model, undisturbed, tmp_path):
    output = tmp_path / "out"
    slow = ["--set", "engine.profile.batch_size=4"]
    process = subprocess.Popen(
        command(model, output, "sample_data/prompts.parquet", *slow), cwd=ROOT, stderr=subprocess.PIPE
    )
    while process.poll() is None and not list(Path(f"{output}.batchinfer").glob("commits/*.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert b"Traceback" not in said
    assert run(model, output).returncode == 0
    assert parts(output) == parts(undisturbed)


def test_hostile_rows_become_results_or_errors_and_never_end_the_job(model, tmp_path):
    more = ("--set", 'sampling.columns.max_tokens="max_tokens"', "--set", "limits.max_failed_fraction=1.0")
    done = run(model, tmp_path / "out", "sample_data/hostile.parquet", *more)
    assert done.returncode == 0, done.stderr
    source, out = pl.read_parquet(ROOT / "sample_data/hostile.parquet"), pl.read_parquet(tmp_path / "out")
    assert out.select(source.columns).equals(source)
    failed = out.filter(pl.col("finish_reason") == "error")
    assert failed["error"].null_count() == 0 and failed["completion"].null_count() == len(failed)
    errors = failed["error"].to_list()
    assert any("null" in error for error in errors)
    prompts = [p for p in failed["prompt"].drop_nulls() if len(p.strip()) > 8]
    assert prompts and not any(prompt[:100] in error for prompt in prompts for error in errors), (
        "errors quote no prompt"
    )


def test_too_many_failed_rows_are_exit_code_3(model, tmp_path):
    done = run(model, tmp_path / "out", "sample_data/hostile.parquet", "--set", "limits.max_failed_fraction=0.01")
    assert done.returncode == 3 and "rows failed" in done.stderr


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["-i", "nowhere.parquet"], 2, "nowhere.parquet"),
        (["-i", "README.md"], 2, "not a readable Parquet file"),
        (["--template", "{{ promt }}"], 2, "prompt"),
        (["-m", "nowhere"], 2, "no model at nowhere"),
        (["-m", "tests"], 2, "no config.json"),
        (["-o", "/proc/nowhere"], 2, "/proc/nowhere"),
        (["--set", "engine.treads=2"], 2, "threads"),
    ],
)
def test_wrong_use_gives_one_clear_line_and_exit_code_2(model, tmp_path, change, code, message):
    words = command(model, tmp_path / "out") + change
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and message in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
