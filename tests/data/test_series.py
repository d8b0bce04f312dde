from __future__ import annotations

import json
import time

import pytest

from batchinfer.backends.echo import EchoBackend
from batchinfer.data.look import look
from batchinfer.data.series import average_rate, read_runs
from batchinfer.errors import EngineError
from tests.echo_jobs import echo_job, run_echo, texts, write


class Slow(EchoBackend):
    """Takes a second, so that there is something to tell meanwhile."""

    def generate(self, requests):
        for i, completion in enumerate(super().generate(requests)):
            if i % 60 == 0:
                time.sleep(0.25)
            yield completion


class Dying(EchoBackend):
    def generate(self, requests):
        yield next(super().generate(requests))
        raise EngineError("out of memory")


def job_of(tmp_path, rows: int = 300, **changes):
    write(tmp_path / "in.parquet", texts(rows))
    return echo_job(tmp_path, **changes)


def lines_of(tmp_path, run: str = "000001") -> list[dict]:
    return [json.loads(line) for line in (tmp_path / f"out.batchinfer/runs/{run}.jsonl").read_text().splitlines()]


def test_a_run_tells_what_it_is_how_it_goes_and_how_it_ended(tmp_path):
    summary = run_echo(job_of(tmp_path, job__name="nightly"), Slow)
    first, *points, last = lines_of(tmp_path)
    assert (first["kind"], first["job"], first["rows"], first["done"]) == ("begin", "nightly", 300, 0)
    assert first["fingerprint"] == look(tmp_path / "out").fingerprint
    assert len(points) >= 2 and {point["kind"] for point in points} == {"point"}
    assert [p["rows"] for p in points] == sorted(p["rows"] for p in points) and points[-1]["rows"] == 300
    assert points[-1]["prompt_tokens"] == summary.job.prompt_tokens
    assert last["kind"] == "end" and last["summary"]["run"]["rows"] == 300
    [run] = read_runs(look(tmp_path / "out").store)
    assert run.summary == last["summary"] and run.error is None and run.seconds > 0.5
    tokens = summary.job.prompt_tokens + summary.job.completion_tokens
    assert average_rate([run]) == pytest.approx(tokens / run.seconds)


def test_it_holds_no_prompt_and_no_path(tmp_path):
    run_echo(job_of(tmp_path, model__path=str(tmp_path / "model")))
    told = (tmp_path / "out.batchinfer/runs/000001.jsonl").read_text()
    assert "row number" not in told and "Say" not in told and str(tmp_path) not in told


def test_a_run_that_dies_says_why_and_the_next_one_has_a_file_of_its_own(tmp_path):
    job = job_of(tmp_path)
    with pytest.raises(EngineError):
        run_echo(job, Dying)
    run_echo(job)
    died, ended = read_runs(look(tmp_path / "out").store)
    assert died.error == "EngineError: out of memory" and died.summary is None
    assert ended.points["computed"][-1] == 299 and ended.points["rows"][-1] == 300 and ended.error is None


def test_a_torn_last_line_is_passed_over(tmp_path):
    run_echo(job_of(tmp_path), Slow)
    path = tmp_path / "out.batchinfer/runs/000001.jsonl"
    whole = path.read_bytes()
    store = look(tmp_path / "out").store
    for end in (len(whole) - 2, len(whole) // 2, 20, 0):
        path.write_bytes(whole[:end])
        runs = read_runs(store)
        assert len(runs) == (end > 20)
        assert all(run.summary is None and len(set(map(len, run.points.values()))) == 1 for run in runs)


def test_a_disk_that_takes_no_lines_leaves_the_run_alone(tmp_path):
    job = job_of(tmp_path)
    (tmp_path / "out.batchinfer" / "runs" / "000001.jsonl").mkdir(parents=True)  # in the way
    assert run_echo(job).state == "complete"
    assert read_runs(look(tmp_path / "out").store) == []
