"""Vacuum removes what no commit refers to, and nothing else ever."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchinfer.cli import main
from batchinfer.data.ledger import Ledger
from batchinfer.data.vacuum import vacuum
from batchinfer.errors import IntegrityError, JobError, LockedError, OutputError
from tests.echo_jobs import echo_job, read_output, run_echo, texts, write
from tests.test_runner import stopped

RUBBISH = (
    "out/part-000000-9.parquet",
    "out/day=1/part-000001-7.parquet",
    "out.batchinfer/staged/000003.1",
    "out.batchinfer/wal/000000.1.arrows",
    "out.batchinfer/commits/000004.json.999999.tmp",
    "out.batchinfer/job.json.tmp",
    "out.batchinfer/leases/000001.json",
)


@pytest.fixture
def rubbish(tmp_path) -> list[str]:
    """A job that was stopped half-way, resumed to its end, and has rubbish lying about."""
    write(tmp_path / "in.parquet", texts(300))
    stopped(echo_job(tmp_path))
    run_echo(echo_job(tmp_path))
    assert (tmp_path / RUBBISH[-1]).exists()
    for name in RUBBISH[:-1]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"rubbish")
    return sorted(str(tmp_path / name) for name in RUBBISH)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def test_a_dry_run_tells_all_and_changes_nothing(tmp_path, rubbish):
    before = everything(tmp_path)
    done = vacuum(tmp_path / "out", dry_run=True)
    assert sorted(done.files) == rubbish and everything(tmp_path) == before
    assert str(done).endswith(f"would remove 7 files, {sum(done.files.values())} bytes · {tmp_path / 'out'}")


def test_rubbish_goes_and_all_else_stays(tmp_path, rubbish):
    before = everything(tmp_path)
    assert sorted(vacuum(tmp_path / "out").files) == rubbish
    assert everything(tmp_path) == {name: data for name, data in before.items() if name not in rubbish}
    assert "nothing to remove" in str(vacuum(tmp_path / "out"))
    assert read_output(tmp_path)["id"].to_pylist() == list(range(300))
    assert run_echo(echo_job(tmp_path)).state == "complete"


def test_an_unfinished_job_keeps_its_logs_and_its_next_epoch(tmp_path):
    write(tmp_path / "in.parquet", texts(300))
    first, second = stopped(echo_job(tmp_path)), stopped(echo_job(tmp_path), after=20)
    logs = os.listdir(tmp_path / "out.batchinfer" / "wal")
    assert logs and [Path(path).name for path in vacuum(tmp_path / "out").files] == ["000001.json"]
    assert os.listdir(tmp_path / "out.batchinfer" / "wal") == logs
    again = run_echo(echo_job(tmp_path))
    assert again.run.rows == 300 - first.run.rows - second.run.rows
    assert (tmp_path / "out.batchinfer" / "leases" / "000003.json").exists()
    assert read_output(tmp_path)["id"].to_pylist() == list(range(300))


def test_a_part_that_is_committed_and_not_yet_moved_is_no_rubbish(tmp_path, monkeypatch):
    write(tmp_path / "in.parquet", texts(60))
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_publish", lambda *_: None)
        with pytest.raises(OSError):
            run_echo(echo_job(tmp_path))  # the manifest finds no part
    assert not list((tmp_path / "out").rglob("*.parquet"))
    assert vacuum(tmp_path / "out").files == {}
    run_echo(echo_job(tmp_path))
    assert read_output(tmp_path)["id"].to_pylist() == list(range(60))


def test_a_running_job_is_left_alone(tmp_path, rubbish):
    with Ledger(tmp_path / "out"):
        for dry_run in (False, True):
            with pytest.raises(LockedError, match=f"process {os.getpid()}"):
                vacuum(tmp_path / "out", dry_run)
    assert (tmp_path / RUBBISH[0]).exists()


def test_where_a_part_is_missing_a_stray_one_may_be_it(tmp_path, rubbish):
    part = next((tmp_path / "out").glob("part-000000-1.parquet"))
    part.rename(part.with_name("part-000000-8.parquet"))
    with pytest.raises(IntegrityError, match="part-000000-1.parquet is missing"):
        vacuum(tmp_path / "out")
    assert all(os.path.exists(path) for path in rubbish)


def test_other_people_s_files_stay_and_are_told(tmp_path, rubbish):
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = vacuum(tmp_path / "out")
    assert done.foreign == [str(tmp_path / "out" / "notes.txt")] and "notes.txt stays" in str(done)
    assert (tmp_path / "out" / "notes.txt").exists()


def test_where_no_job_was_begun_nothing_is_made(tmp_path):
    with pytest.raises(JobError, match="no job was begun"):
        vacuum(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_removed_is_an_error(tmp_path, rubbish, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OutputError, match="cannot remove .*part-.*: Permission denied"):
        vacuum(tmp_path / "out")


def test_the_command_tells_what_it_does(tmp_path, rubbish):
    shown = CliRunner().invoke(main, ["vacuum", str(tmp_path / "out"), "--dry-run"])
    assert shown.exit_code == 0 and shown.stdout.splitlines()[:-1] == list(vacuum(tmp_path / "out", True).files)
    told = json.loads(CliRunner().invoke(main, ["vacuum", str(tmp_path / "out"), "--json"]).stdout)
    assert sorted(told["files"]) == rubbish and told["dry_run"] is False and told["bytes"] > 0
    assert CliRunner().invoke(main, ["vacuum", str(tmp_path / "nowhere")]).exit_code == 2
