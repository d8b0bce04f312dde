"""Whole jobs through the command line: the engine in its own process, killed, hung and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.backends.tensorrt_llm.site import ROOT, command, events, install, make_job, process_environ

EMPTY, LONG = "", "long " * 200


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("site") / "stable", "1.2.1")


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("site") / "late", "1.4.0rc1")


def write(folder: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), folder / "in.parquet")


def job_file(folder: Path, model: Path, **changes) -> str:
    """The job as TOML, as a user has it; JSON's values are TOML's here."""
    job = make_job(folder, model, **{"limits__engine_timeout": "30s", **changes})
    lines: list[str] = []

    def section(name: str, value: dict) -> None:
        plain = {k: v for k, v in value.items() if not isinstance(v, dict) and v is not None}
        lines.extend([f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in plain.items())])
        for key, inner in value.items():
            if isinstance(inner, dict):
                section(f"{name}.{key}", inner)

    for name, value in job.model_dump(mode="json", exclude_defaults=True).items():
        section(name, value)
    file = folder / "job.toml"
    file.write_text("\n".join(lines))
    return str(file)


def output(folder: Path) -> pa.Table:
    parts = sorted((folder / "out").glob("*.parquet"), key=lambda part: pq.read_table(part)["id"][0].as_py())
    return pa.concat_tables([pq.read_table(part).replace_schema_metadata(None) for part in parts])


def rows(folder: Path) -> list[tuple]:
    table = output(folder)
    assert table["id"].to_pylist() == list(range(len(table)))  # every row once, in order
    return list(zip(table["text"].to_pylist(), table["completion"].to_pylist(), table["error"].to_pylist()))


def test_a_job_of_a_thousand_rows_with_bad_ones_and_two_deaths_ends_complete(tmp_path, model, site):
    """3 % bad rows, of every kind, and an engine that dies twice: nothing is lost, nothing comes twice."""
    bad = [EMPTY, LONG, "!refuse", "!timeout", "!unfinished", "!oom"] * 5
    texts = [f"say answer {i}" for i in range(1000)]
    for i, text in enumerate(bad):
        texts[17 + 33 * i - i % 7] = text
    write(tmp_path, texts)
    log = tmp_path / "log"
    file = job_file(tmp_path, model)
    done = command(site, "run", file, "--json", faults={"log": str(log), "die_after": 250, "times": 2})
    assert done.returncode == 0, done.stderr
    assert len(events(log, "killed")) == 2 and len(events(log, "load")) == 3
    said = json.loads(done.stdout)
    assert said["job"]["rows"] == 1000 and said["job"]["failed"] == 30
    for text, completion, error in rows(tmp_path):
        if text.startswith("say"):
            assert (completion, error) == (text.removeprefix("say "), None)
        else:
            assert completion is None and error
    again = command(site, "run", file, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["run"]["rows"] == 0


def test_the_columns_are_those_of_every_engine(tmp_path, model, site):
    write(tmp_path, ["say hello", "say one two three", EMPTY])
    file = job_file(tmp_path, model, sampling__max_tokens=12, sampling__stop=["two"])
    assert command(site, "run", file).returncode == 0
    table = output(tmp_path)
    assert table.column_names == [
        "id",
        "text",
        "completion",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "error",
    ]
    assert table["completion"].to_pylist() == ["hello", "one ", None]
    assert table["finish_reason"].to_pylist() == ["stop", "stop", "error"]
    assert table["prompt_tokens"].to_pylist()[:2] == [9, 17]
    assert table["completion_tokens"].to_pylist()[:2] == [6, 7]


@pytest.mark.parametrize(
    ("word", "why"), [("!poison", "signal 9"), ("!freeze", "engine_timeout"), ("!cuda", "illegal memory access")]
)
def test_the_row_that_kills_the_engine_is_set_aside_with_its_reason_and_all_others_are_answered(
    tmp_path, model, site, word, why
):
    texts = [f"say {i}" for i in range(12)]
    texts[3] = word
    write(tmp_path, texts)
    done = command(site, "run", job_file(tmp_path, model, limits__engine_timeout="2s"))
    assert done.returncode == 0, done.stderr
    for text, completion, error in rows(tmp_path):
        assert (completion == text.removeprefix("say ")) is (text != word)
        assert (error is not None and why in error) is (text == word)


def test_an_error_that_an_innocent_row_meets_is_not_held_against_it(tmp_path, model, site):
    texts = [f"say {i}" for i in range(10)]
    texts[3] = "!background"
    write(tmp_path, texts)
    done = command(site, "run", job_file(tmp_path, model, limits__engine_timeout="2s"))
    assert done.returncode == 0, done.stderr
    assert [text for text, _, error in rows(tmp_path) if error] == ["!background"]
    assert "background thread failed" in done.stderr


def test_a_burst_of_bad_rows_that_only_the_engine_can_tell_does_not_end_a_late_version(tmp_path, model, late):
    texts = [f"say {i}" for i in range(60)]
    texts[10:24] = [f"!refuse {i}" for i in range(14)]
    write(tmp_path, texts)
    done = command(late, "run", job_file(tmp_path, model))
    assert done.returncode == 0, done.stderr
    failed = [(text, error) for text, _, error in rows(tmp_path) if error]
    assert len(failed) == 14 and all("refused" in error or "died" in error for _, error in failed)


def test_a_cancelled_request_is_asked_again(tmp_path, model, site):
    write(tmp_path, ["say x", "!flaky", "!cancel"])
    assert command(site, "run", job_file(tmp_path, model, limits__max_failed_fraction=0.5)).returncode == 0
    answered, flaky, cancelled = rows(tmp_path)
    assert answered[1] == "x" and flaky[1] == "ok !flaky" and "cancelled" in cancelled[2]


def test_too_many_failed_rows_are_exit_code_3(tmp_path, model, site):
    write(tmp_path, ["!refuse"] * 9 + ["say x"])
    done = command(site, "run", job_file(tmp_path, model))
    assert done.returncode == 3 and "9 of 10 rows failed" in done.stderr


def test_a_worker_that_is_killed_from_outside_is_replaced(tmp_path, model, site):
    write(tmp_path, [f"say {i}" for i in range(400)])
    log = tmp_path / "log"
    run = subprocess.Popen(
        [sys.executable, "-m", "batchinfer", "run", job_file(tmp_path, model)],
        env=process_environ(site, {"log": str(log), "compute_seconds": 0.05}),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not events(log, "load"):
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(events(log, "load")[0]["pid"], signal.SIGKILL)
    said = run.communicate(timeout=100)[1]
    assert run.returncode == 0, said
    assert len(events(log, "load")) == 2
    assert [completion for _, completion, _ in rows(tmp_path)] == [str(i) for i in range(400)]


def test_a_run_that_is_interrupted_commits_and_goes_on(tmp_path, model, site):
    write(tmp_path, [f"say {i}" for i in range(600)])
    log, file = tmp_path / "log", job_file(tmp_path, model)
    run = subprocess.Popen(
        [sys.executable, "-m", "batchinfer", "run", file],
        env=process_environ(site, {"log": str(log), "compute_seconds": 0.05}),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not list((tmp_path / "out").glob("*.parquet")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=100)[1]
    assert run.returncode == 75, said
    done = command(site, "run", file, "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["run"]["rows"] < 600
    assert [completion for _, completion, _ in rows(tmp_path)] == [str(i) for i in range(600)]


def test_the_engine_is_started_anew_every_so_many_rows(tmp_path, model, site):
    write(tmp_path, [f"say {i}" for i in range(300)])
    log = tmp_path / "log"
    done = command(site, "run", job_file(tmp_path, model, engine__tensorrt__recycle_rows=100), faults={"log": str(log)})
    assert done.returncode == 0, done.stderr
    assert 2 <= len({load["pid"] for load in events(log, "load")}) <= 4
    assert [completion for _, completion, _ in rows(tmp_path)] == [str(i) for i in range(300)]


def test_the_process_sees_no_batch_systems_mpi_and_tells_nobody(tmp_path, model, site):
    write(tmp_path, ["say x"])
    log = tmp_path / "log"
    around = {"SLURM_JOB_ID": "7", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "0", "PMI_RANK": "0"}
    done = command(site, "run", job_file(tmp_path, model, engine__tp=2), faults={"log": str(log)}, **around)
    assert done.returncode == 0, done.stderr
    [load] = events(log, "load")
    seen = load["environ"]
    assert not set(around) & set(seen)
    assert seen["TRTLLM_NO_USAGE_STATS"] == "1" and len(seen["PMIX_HOSTNAME"]) < 16
    assert load["arguments"]["tensor_parallel_size"] == 2


@pytest.mark.parametrize(("where", "how"), [("import", "exit"), ("load", "kill"), ("load", "hang")])
def test_an_engine_that_dies_while_it_is_opened_is_exit_code_1_in_a_line(tmp_path, model, site, where, how):
    write(tmp_path, ["say x"])
    done = command(site, "run", job_file(tmp_path, model, limits__engine_timeout="0.5s"), faults={where: how})
    assert done.returncode == 1 and "died while it was opened" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_an_engine_that_dies_or_hangs_at_its_end_has_done_its_work(tmp_path, model, site, how):
    write(tmp_path, ["say x"])
    done = command(site, "run", job_file(tmp_path, model), faults={"shutdown": how})
    assert done.returncode == 0 and rows(tmp_path)[0][1] == "x"


def test_a_job_that_drew_with_another_engine_is_refused(tmp_path, model, site, late):
    write(tmp_path, [f"say {i}" for i in range(20)])
    file = job_file(tmp_path, model)
    assert command(site, "run", file).returncode == 0
    (tmp_path / "out.batchinfer" / "_SUCCESS").unlink()
    guided = command(site, "run", file, "--set", 'engine.tensorrt.guided_json={"type":"object"}')
    assert guided.returncode == 4 and "guided_json" in guided.stderr


def test_what_cannot_be_is_told_by_validate_and_by_run(tmp_path, model, site, late):
    write(tmp_path, ["say x"])
    file = job_file(tmp_path, model, engine__tensorrt__flavour="engine")
    for verb in ("validate", "run"):
        done = command(late, verb, file)
        assert done.returncode == 2 and "tensorrt_llm 1.4.0rc1 has no TensorRT engines any more" in done.stderr
    assert command(site, "validate", file).returncode == 0
    nowhere = command(ROOT, "run", file)
    assert nowhere.returncode == 2 and "is not installed: pip install" in nowhere.stderr
    assert command(ROOT, "validate", file).returncode == 0  # where it will run is elsewhere


def test_build_and_run_an_engine_from_the_command_line(tmp_path, model, site):
    write(tmp_path, ["say x", EMPTY, "say y"])
    log = tmp_path / "log"
    file = job_file(tmp_path, model, engine__tensorrt__flavour="engine")
    quantised = ("--quantization", "fp8", "-o", str(tmp_path / "engine"))
    made = command(site, "build", file, *quantised, faults={"log": str(log)})
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(tmp_path / "engine") and events(log, "compile")[0]["rows"] == 2
    plan = command(site, "plan", file, "--set", f"engine.plan={tmp_path / 'engine'}")
    assert plan.returncode == 0, plan.stderr
    done = command(site, "run", file, "--set", f"engine.plan={tmp_path / 'engine'}")
    assert done.returncode == 0, done.stderr
    assert [completion for _, completion, _ in rows(tmp_path)] == ["x", None, "y"]
