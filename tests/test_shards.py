"""Several runs that share one job: how they keep out of each other's way, and what they leave together."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from unittest import mock

import pytest

from batchinfer.backends.echo import EchoBackend
from batchinfer.data.ledger import Ledger
from batchinfer.data.standing import standing
from batchinfer.errors import ExitCode, JobDriftError, LockedError
from batchinfer.job import Job
from batchinfer.runner import run
from batchinfer.shard import Shard
from tests.echo_jobs import echo_job, read_output, run_echo, texts, tokenizer_dir, write

ROWS = 640


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "in.parquet", texts(ROWS))
    return tmp_path


def shard(folder: Path, name: str, **changes) -> Job:
    return echo_job(folder, job__shard=name, **changes)


def success(folder: Path) -> bool:
    return (folder / "out.batchinfer" / "_SUCCESS").exists()


def test_shards_one_after_the_other_make_the_whole_and_only_the_last_says_so(folder):
    done = 0
    for name in ("2/3", "0/3", "1/3"):
        assert not success(folder)
        summary = run_echo(shard(folder, name))
        done += summary.rows
        assert summary.exit_code == 0 and summary.run.rows == summary.rows == summary.job.rows
        assert (summary.shard, summary.whole.job.rows, summary.whole.rows) == (name, done, ROWS)
    assert success(folder) and read_output(folder)["id"].to_pylist() == list(range(ROWS))
    with Ledger(folder / "out") as ledger:
        assert ledger.verify() == ROWS
    kept = json.loads((folder / "out.batchinfer" / "shards" / "0-of-3.json").read_text())
    assert kept["shard"] == "0/3" and kept["whole"]["state"] == "stopped"
    assert json.loads((folder / "out.batchinfer" / "summary.json").read_text())["job"]["rows"] == ROWS


def test_a_shard_that_is_done_asks_no_engine_and_a_whole_run_does_what_shards_left(folder):
    run_echo(shard(folder, "0/2"))

    def no_engine(tokenizer: Path):
        raise AssertionError("there is nothing to ask")

    again = run_echo(shard(folder, "0/2"), no_engine)
    assert again.state == "complete" and again.run.rows == 0 and again.whole.state == "stopped"
    rest = run_echo(echo_job(folder))
    assert rest.run.rows == ROWS - again.rows and success(folder)


def test_more_shards_than_units_end_well(folder):
    for index in range(12):
        assert run_echo(shard(folder, f"{index}/12")).exit_code == 0
    assert success(folder) and read_output(folder).num_rows == ROWS


class Waiting(EchoBackend):
    """Answers nothing until all have been asked something."""

    together: threading.Barrier

    def generate(self, requests):
        for answered, completion in enumerate(super().generate(requests)):
            if not answered:
                self.together.wait(30)
            yield completion


def test_shards_that_begin_an_output_at_the_same_moment_share_one_plan(folder):
    Waiting.together = threading.Barrier(4)
    summaries: dict[int, object] = {}

    def work(index: int) -> None:
        summaries[index] = run(shard(folder, f"{index}/4"), progress=False)

    threads = [threading.Thread(target=work, args=[index]) for index in range(4)]
    with mock.patch("batchinfer.runner.open_backend", lambda job, progress: Waiting(tokenizer_dir())):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [summaries[index].exit_code for index in range(4)] == [0] * 4
    assert sum(summary.run.rows for summary in summaries.values()) == ROWS
    assert success(folder) and read_output(folder)["id"].to_pylist() == list(range(ROWS))
    with Ledger(folder / "out") as ledger:
        assert ledger.verify() == ROWS


@pytest.mark.parametrize(
    "first, second, said",
    [
        ("0/2", "0/2", "shard 0/2 of .* by another run: process"),
        ("0/2", None, "by shard 0/2: process"),
        (None, "0/2", "by another run: process"),
        ("0/2", "1/3", "by shard 0/2: process .* must count alike"),
    ],
)
def test_runs_that_would_do_the_same_work_are_refused_and_told_by_whom(folder, first, second, said):
    with Ledger(folder / "out", shard=Shard.of(first)):
        with pytest.raises(LockedError, match=said) as refused:
            Ledger(folder / "out", shard=Shard.of(second)).__enter__()
        assert refused.value.exit_code == ExitCode.LOCKED


def test_a_run_with_another_count_is_welcome_once_the_shards_have_ended(folder):
    run_echo(shard(folder, "0/2"))
    for index in range(3):
        run_echo(shard(folder, f"{index}/3"))
    assert success(folder) and read_output(folder)["id"].to_pylist() == list(range(ROWS))


def test_a_shard_of_another_job_is_refused(folder):
    run_echo(shard(folder, "0/2"))
    with pytest.raises(JobDriftError, match="sampling.max_tokens: 256 -> 8"):
        run_echo(shard(folder, "1/2", sampling__max_tokens=8))


def test_a_plan_that_another_job_began_and_never_finished_beginning_is_not_taken_over(folder, monkeypatch):
    monkeypatch.setattr("batchinfer.data.ledger.PATIENCE", 0.0)
    run_echo(shard(folder, "0/2", checkpoint__unit_rows=32))
    control = folder / "out.batchinfer"
    plan = (control / "plan-000.parquet").read_bytes()
    for part in (folder / "out").iterdir():
        part.unlink()
    for path in sorted(control.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (control / "plan-000.parquet").write_bytes(plan)
    with pytest.raises(LockedError, match="job.json does not come"):
        run_echo(shard(folder, "0/2"))
    assert run_echo(shard(folder, "0/2", checkpoint__unit_rows=32)).exit_code == 0, "equal units may be gone on with"


def test_a_shard_clears_what_its_own_dead_run_left_and_nothing_of_others(folder):
    class Dying(EchoBackend):
        def generate(self, requests):
            yield next(super().generate(requests))
            raise RuntimeError("gone")

    for name in ("0/2", "1/2"):
        with pytest.raises(RuntimeError):
            run_echo(shard(folder, name), Dying)
    staged = folder / "out.batchinfer" / "staged"
    for epoch in (1, 2):
        (staged / f"000000.{epoch}").write_bytes(b"half a part")
        (folder / "out.batchinfer" / "commits" / f"000000.json.abc.{epoch}.tmp").write_bytes(b"{")
    with Ledger(folder / "out", shard=Shard(1, 2)):
        assert [path.name for path in staged.iterdir()] == ["000000.1"], "which a shard on another host may be writing"
        assert len(list((folder / "out.batchinfer" / "commits").glob("*.tmp"))) == 2
    with Ledger(folder / "out"):
        assert not list(staged.iterdir())


def test_the_last_shard_moves_what_one_committed_and_died_before_moving(folder):
    run_echo(shard(folder, "0/2"))
    [record, *_] = sorted((folder / "out.batchinfer" / "commits").iterdir())
    commit = json.loads(record.read_text())
    (folder / "out" / commit["part"]).rename(folder / "out.batchinfer" / "staged" / f"{commit['unit']:06d}.1")
    run_echo(shard(folder, "1/2"))
    assert success(folder) and read_output(folder)["id"].to_pylist() == list(range(ROWS))


def test_files_that_are_appended_are_shared_out_too_and_the_success_is_withdrawn_meanwhile(folder):
    (folder / "in").mkdir()
    (folder / "in.parquet").rename(folder / "in" / "b.parquet")
    how = {"source": folder / "in", "input__on_change": "append"}
    for name in ("0/2", "1/2"):
        run_echo(shard(folder, name, **how))
    assert success(folder)
    write(folder / "in" / "a.parquet", texts(300))
    run_echo(shard(folder, "1/2", **how))
    assert not success(folder)
    run_echo(shard(folder, "0/2", **how))
    assert success(folder) and read_output(folder)["id"].to_pylist() == [*range(ROWS), *range(300)]


def test_a_shard_that_missed_what_another_appended_says_that_it_is_not_done(folder):
    (folder / "in").mkdir()
    (folder / "in.parquet").rename(folder / "in" / "b.parquet")
    how = {"source": folder / "in", "input__on_change": "append"}

    class Meanwhile(EchoBackend):
        def generate(self, requests):
            write(folder / "in" / "a.parquet", texts(300))
            run_echo(shard(folder, "1/2", **how))
            yield from super().generate(requests)

    run_echo(shard(folder, "1/2", **how))
    assert run_echo(shard(folder, "0/2", **how), Meanwhile).exit_code == ExitCode.STOPPED
    assert run_echo(shard(folder, "0/2", **how)).exit_code == 0 and success(folder)


def test_status_shows_each_shard(folder):
    seen = []

    class Looking(EchoBackend):
        def generate(self, requests):
            seen.append(standing(folder / "out"))
            yield from super().generate(requests)

    rows = run_echo(shard(folder, "0/2")).rows
    run_echo(shard(folder, "1/2"), Looking)
    first, second = seen[0].shards
    assert (first.shard, first.running, first.committed, first.rows) == ("0/2", False, rows, rows)
    assert (second.shard, second.running, second.committed, second.rows) == ("1/2", True, 0, ROWS - rows)
    assert f"shard 0/2 · {rows} of {rows} rows committed · done" in str(seen[0])
    assert "shard 1/2 · 0 of" in str(seen[0]) and "running, process" in str(seen[0])
    assert seen[0].as_dict()["shards"][1]["running"] and seen[0].state == "running"
    run_echo(echo_job(folder, output__path=str(folder / "whole")))
    assert standing(folder / "whole").shards == []
