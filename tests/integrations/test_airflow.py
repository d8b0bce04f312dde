"""The Airflow integration under real Airflow, which lives in an environment of its own (see the Makefile)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchinfer
from tests.echo_jobs import texts, tokenizer_dir, write

ROOT = Path(__file__).parents[2]
JOB = """
[input]
path = "named by the task"
[prompt]
template = "Say {{ prompt }}"
[model]
path = "echo"
[engine]
backend = "echo"
[output]
path = "named by the task"
[checkpoint]
unit_rows = 20
[report]
log_seconds = 0.5
"""


class Airflow:
    """An installed Airflow with a database of its own, and a root folder for the example DAGs."""

    def __init__(self, python: Path, folder: Path, migrated: Path) -> None:
        self.python, self.folder, self.root = python, folder, folder / "data"
        self.notes = folder / "answers"
        (folder / "job.toml").write_text(JOB)
        (folder / "home").mkdir()
        shutil.copy(migrated, folder / "home" / "airflow.db")

    def start(self, *arguments: str, seconds_a_row: float = 0.0) -> subprocess.Popen:
        env = settings(self.folder / "home") | {
            "NIGHTLY_ROOT": str(self.root),
            "NIGHTLY_JOB": str(self.folder / "job.toml"),
            "NIGHTLY_SHARDS": "2",
            "BATCHINFER": f"{sys.executable} -m tests.slow_echo",
            "SLOW_ECHO": str(seconds_a_row),
            "SLOW_ECHO_NOTES": str(self.notes),
        }
        command = [str(self.python), "tests/integrations/airflow_script.py", *arguments]
        log = open(self.folder / "log", "w")  # noqa: SIM115  (the process has it from here on)
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True)

    def finish(self, process: subprocess.Popen):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, self.log
        self.said = said
        return json.loads(said.splitlines()[-1])

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def answered(self) -> Counter:
        return Counter(self.notes.read_text().splitlines()) if self.notes.exists() else Counter()


def settings(home: Path) -> dict[str, str]:
    """An environment for Airflow, with nothing of this one's."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "BATCHINFER_CACHE")} | {
        "PYTHONPATH": str(ROOT),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "jobs"),
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
    }


@pytest.fixture(scope="session", params=[3, pytest.param(2, marks=pytest.mark.airflow2)])
def installed(request, tmp_path_factory) -> tuple[Path, Path]:
    """Airflow's Python, and a database that is ready for it."""
    name = "airflow" if request.param == 3 else "airflow2"
    python = Path(os.environ.get(f"{name.upper()}_VENV", ROOT / f".venv-{name}"), "bin", "python")
    if not python.exists():
        pytest.skip(f"no {python.parent.parent}: `make test-{name}` makes it")
    home = tmp_path_factory.mktemp(name)
    command = [str(python), "-m", "airflow", "db", "migrate"]
    subprocess.run(command, env=settings(home), check=True, capture_output=True, timeout=300)
    tokenizer_dir()
    return python, home / "airflow.db"


@pytest.fixture
def airflow(installed, tmp_path) -> Airflow:
    return Airflow(installed[0], tmp_path, installed[1])


@pytest.mark.slow
def test_the_nightly_dag_answers_every_row_once_though_a_task_is_killed_on_the_way(airflow):
    rows = 400
    prompts = texts(rows).rename_columns(["id", "prompt"])
    for begin in (0, rows // 2):
        write(airflow.root / "prompts" / "day=2026-02-01" / f"{begin}.parquet", prompts.slice(begin, rows // 2))
    nightly = airflow.start("nightly", "jobs/airflow_nightly.py", "2026-02-02T02:00", seconds_a_row=0.02)
    killed = None
    while killed is None:
        time.sleep(0.1)
        assert nightly.poll() is None, airflow.log
        if sum(airflow.answered().values()) > 50:
            killed = next(iter(runs_under(nightly.pid)))
    os.kill(killed, signal.SIGKILL)
    found = airflow.finish(nightly)
    tries = {(task, index): (state, number) for task, index, state, number in found["tasks"]}
    assert found["state"] == "success" and {state for state, _ in tries.values()} == {"success"}
    assert sorted(number for (task, _), (_, number) in tries.items() if task == "infer") == [1, 2]

    output = airflow.root / "answers" / "day=2026-02-01"
    assert sorted(pq.read_table(output, partitioning=None)["id"].to_pylist()) == list(range(rows))
    answered = airflow.answered()
    again = sum(answered.values()) - len(answered)
    print(f"rows {rows}, lost 0, doubled 0, computed again {again}")
    assert len(answered) == rows and again <= 64
    told = found["returned"]["report"]
    assert told["rows"] == rows and Path(told["page"]).stat().st_size > 1000
    assert "ended with exit code -9 (signal 9)" in airflow.said + airflow.log, "why the first try failed"
    assert re.search(r"rows .*tok/s", airflow.said + airflow.log), "progress is in the task's log"


def runs_under(pid: int) -> list[int]:
    """Processes that ``pid`` started and that run a job."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"slow_echo" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_the_taskflow_dag_takes_as_many_shards_as_there_are_files(airflow):
    for index in range(3):
        table = texts(30).rename_columns(["id", "prompt"])
        write(airflow.root / "prompts" / "day=2026-02-01" / f"{index}.parquet", table)
    found = airflow.finish(airflow.start("nightly", "jobs/airflow_taskflow.py", "2026-02-02T02:00"))
    assert found["state"] == "success" and found["returned"]["total"]["rows"] == 90
    assert [index for task, index, *_ in found["tasks"] if task == "infer"] == [0, 1, 2]


@pytest.mark.slow
def test_an_exit_code_decides_whether_the_task_is_tried_again(airflow):
    counts = {"rows": 8, "ok": 7, "failed": 1, "skipped": 0, "prompt_tokens": 80, "completion_tokens": 40}
    summary = {
        "output": "/o", "state": "complete", "job": counts,
        "run": {"seconds": 2.0, "tokens_per_second": {"total": 60.0}},
    }  # fmt: skip
    print_it = f"echo '{json.dumps(summary)}'"
    last_words = "echo 'batchinfer: why' >&2;"
    cases = [
        (print_it, {}),
        *((f"{last_words} exit {code}", {}) for code in (1, 2, 4, 5, 6, 75)),
        *((f"{print_it}; exit 3", {"on_failed_rows": what}) for what in ("fail", "retry", "accept")),
        ("kill -9 $$", {}),
        ("trap 'exit 75' TERM; kill -TERM $PPID; while :; do sleep 0.1; done", {}),
        ("trap '' TERM; kill -TERM $PPID; while :; do sleep 0.1; done", {"stop_seconds": 0.3}),
        ("exit 0", {"shard": 1}),
    ]
    found = airflow.finish(airflow.start("judge", json.dumps(cases)))
    manifest = {
        "output": "/o", "shard": None, "complete": True, "manifest": "/o.batchinfer/manifest.json",
        "seconds": 2.0, "tokens_per_second": 60.0, **counts,
    }  # fmt: skip
    again, for_good = "to be tried again", "failed for good"
    assert found[0] == ["returned", manifest]
    assert [state for state, _ in found[1:7]] == [again, for_good, for_good, again, for_good, again]
    assert all("batchinfer: why" in said and "exit code" in said for _, said in found[1:7])
    assert [state for state, _ in found[7:10]] == [for_good, again, "returned"]
    assert [state for state, _ in found[10:13]] == [again] * 3
    assert "(STOPPED)" in found[11][1] and "(signal 9)" in found[12][1]
    assert found[13][0] == for_good and "go together" in found[13][1]


@pytest.mark.slow
def test_the_command_carries_what_the_task_was_given_and_a_name_that_no_try_changes(airflow):
    echo = 'printf "%s\\n" "$@" >&2; exit 2'
    given = {
        "job": "j.toml", "input_path": "in", "output_path": "out", "model": "m", "env": {"KEY": "hidden"},
        "overrides": {"engine.threads": 2, "report.log_seconds": 0.5, "sampling.stop": ["a", "é"], "x.y": "off"},
    }  # fmt: skip
    cases = [(echo, given | {"shard": 1, "num_shards": "3", "map_index": 1}), (echo, {"map_index": 4})]
    _, (_, mapped) = airflow.finish(airflow.start("judge", json.dumps(cases)))
    said = airflow.log + airflow.said
    for words in (["-i", "in"], ["-o", "out"], ["-m", "m"], ["--shard", "1/3"]):
        assert " ".join(words) in said
    for setting in ("engine.threads=2", "report.log_seconds=0.5", 'sampling.stop=["a", "é"]', "x.y=off"):
        assert setting in said
    assert re.search(r"job\.name=dag\.task\.manual(?!\.)", said), "shards are one job"
    assert "job.name=dag.task.manual.4" in mapped and "hidden" not in said


@pytest.mark.slow
def test_parsing_the_dags_loads_nothing_heavy_and_airflow_lists_the_provider(airflow):
    found = airflow.finish(airflow.start("parse", "jobs/airflow_nightly.py", "jobs/airflow_taskflow.py"))
    print(f"seconds to import: {found['seconds']}")
    assert found["brought"] == []
    assert found["provider"] == ["batchinfer", batchinfer.__version__]
