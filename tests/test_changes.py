"""What becomes of a run when its input or its job has changed since the output was begun."""

from __future__ import annotations

import json
import os
import signal
from unittest import mock

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchinfer.backends.echo import EchoBackend
from batchinfer.cli import main
from batchinfer.data.ledger import Ledger
from batchinfer.errors import DriftError, EngineError, IntegrityError, LockedError, OutputError
from batchinfer.runner import run
from tests.conftest import DEMO_MODEL
from tests.echo_jobs import echo_job, read_output, run_echo, texts, tokenizer_dir, write


def add(folder, name, rows, first=0, **columns):
    table = pa.table({"id": pa.array(range(first, first + rows), pa.int64()), "text": ["some text"] * rows})
    for column, values in columns.items():
        table = table.append_column(column, values)
    return write(folder / "in" / name, table, row_group_size=50)


def job(folder, on_change="append", **changes):
    return echo_job(folder, folder / "in", input__on_change=on_change, **changes)


def ids(folder):
    return read_output(folder)["id"].to_pylist()


def plans(folder):
    return sorted(name for name in os.listdir(folder / "out.batchinfer") if name.startswith("plan-"))


# ---- input


def test_appended_files_are_planned_after_the_others_and_what_is_committed_stays(tmp_path):
    add(tmp_path, "m.parquet", 100)
    run_echo(job(tmp_path))
    old = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    add(tmp_path, "a.parquet", 70, first=100)  # sorted before it, planned after it
    with pytest.raises(DriftError, match="a.parquet was added .*--on-input-change append") as drift:
        run_echo(job(tmp_path, "error"))
    assert drift.value.exit_code == 4 and plans(tmp_path) == ["plan-000.parquet"]
    summary = run_echo(job(tmp_path, checkpoint__unit_rows=50))
    assert (summary.state, summary.run.rows, summary.job.rows, summary.rows) == ("complete", 70, 170, 170)
    assert plans(tmp_path) == ["plan-000.parquet", "plan-001.parquet"]
    assert ids(tmp_path) == list(range(170))
    assert old.items() <= {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}.items()
    add(tmp_path, "z.parquet", 5, first=170)
    assert run_echo(job(tmp_path)).run.rows == 5 and ids(tmp_path) == list(range(175))
    assert run_echo(job(tmp_path, "error")).run.rows == 0 and len(plans(tmp_path)) == 3


def test_appending_to_an_unfinished_output_and_dying_on_the_way_loses_nothing(tmp_path):
    class Dying(EchoBackend):
        def generate(self, requests):
            for count, completion in enumerate(super().generate(requests)):
                if count == 90:
                    raise EngineError("out of memory")
                yield completion

    add(tmp_path, "a.parquet", 200)
    for file, first in (("b.parquet", 200), ("c.parquet", 300)):
        with pytest.raises(EngineError):
            run_echo(job(tmp_path), Dying)
        add(tmp_path, file, 100, first)
    assert run_echo(job(tmp_path)).run.rows == 220
    assert ids(tmp_path) == list(range(400)) and len(plans(tmp_path)) == 3


def test_ignore_goes_on_with_the_files_of_the_plan(tmp_path):
    add(tmp_path, "b.parquet", 100)
    run_echo(job(tmp_path))
    add(tmp_path, "a.parquet", 10, extra=pa.array(range(10)))
    summary = run_echo(job(tmp_path, "ignore"), lambda folder: pytest.fail("the model was opened"))
    assert (summary.state, summary.rows) == ("complete", 100) and plans(tmp_path) == ["plan-000.parquet"]


@pytest.mark.parametrize("on_change", ["error", "append", "ignore"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_planned_file_that_changed_or_went_is_an_error_whatever_is_allowed(tmp_path, on_change, how):
    for name in ("a.parquet", "b.parquet"):
        add(tmp_path, name, 10)
    run_echo(job(tmp_path))
    add(tmp_path, "a.parquet", 11) if how == "changed" else (tmp_path / "in" / "a.parquet").unlink()
    with pytest.raises(DriftError, match=f"a.parquet.*{how}"):
        run_echo(job(tmp_path, on_change))


@pytest.mark.parametrize("extra", [{"more": pa.array(["x"] * 10)}, {}])
def test_files_with_other_columns_cannot_be_appended(tmp_path, extra):
    add(tmp_path, "b.parquet", 10)
    run_echo(job(tmp_path))
    add(tmp_path, "a.parquet", 10, **extra)
    if not extra:
        write(tmp_path / "in" / "a.parquet", pa.table({"id": [0.5], "text": ["a"]}))
    with pytest.raises(DriftError, match=r"\+ more: string" if extra else r"- id: int64(.|\n)*\+ id: double"):
        run_echo(job(tmp_path))
    assert run_echo(job(tmp_path, "ignore")).state == "complete"


def test_columns_that_an_appended_file_lacks_are_null(tmp_path):
    add(tmp_path, "b.parquet", 10)
    run_echo(job(tmp_path))
    write(tmp_path / "in" / "a.parquet", pa.table({"text": ["a"] * 3}))
    assert run_echo(job(tmp_path)).run.rows == 3
    assert pl.scan_parquet(tmp_path / "out").select("id").collect()["id"].null_count() == 3


def test_a_lost_plan_is_an_integrity_error(tmp_path):
    add(tmp_path, "a.parquet", 10)
    run_echo(job(tmp_path))
    add(tmp_path, "b.parquet", 10)
    run_echo(job(tmp_path))
    (tmp_path / "out.batchinfer" / "plan-001.parquet").unlink()
    with pytest.raises(IntegrityError, match="unit 1 is committed"):
        run_echo(job(tmp_path))


def test_of_two_runs_that_append_at_once_one_is_sent_back(tmp_path):
    add(tmp_path, "a.parquet", 10)
    run_echo(job(tmp_path))
    add(tmp_path, "b.parquet", 10)

    class Slower(EchoBackend):
        """While it opens, another run, past a lock that does not hold, appends."""

        def __init__(self, folder):
            super().__init__(folder)
            (tmp_path / "out.batchinfer" / "plan-001.parquet").write_bytes(b"another run's")

    with pytest.raises(LockedError, match="has just appended"):
        run_echo(job(tmp_path), Slower)


# ---- job


def fork(job, **options):
    opened = []
    backend = options.pop("backend", EchoBackend)
    with mock.patch("batchinfer.runner.open_backend", lambda *_: opened.append(1) or backend(tokenizer_dir())):
        summary = run(job, progress=options.pop("progress", False), fork=True)
    assert len(opened) <= 1
    return summary


def simple(folder, **changes):
    if not (folder / "in.parquet").exists():
        write(folder / "in.parquet", texts(100))
    return echo_job(folder, **changes)


def test_a_changed_job_forks_beside_the_old_one_and_finds_its_fork_again(tmp_path, capsys):
    run_echo(simple(tmp_path))
    before = (tmp_path / "out.batchinfer" / "job.json").read_bytes()
    for tokens, name in ((3, "out-2"), (4, "out-3")):
        changed = simple(tmp_path, sampling__max_tokens=tokens)
        with pytest.raises(DriftError, match="with --fork"):
            run_echo(changed)
        summary = fork(changed, progress=None)
        assert summary.output == tmp_path / name and (summary.state, summary.run.rows) == ("complete", 100)
        assert f"is another job's, this one goes to {tmp_path / name}" in capsys.readouterr().err
        assert fork(changed, backend=lambda folder: pytest.fail("the model was opened")).output == tmp_path / name
        assert pl.scan_parquet(tmp_path / name).collect()["completion_tokens"].to_list() == [tokens] * 100
    assert (tmp_path / "out.batchinfer" / "job.json").read_bytes() == before
    assert fork(simple(tmp_path)).output == tmp_path / "out", "the unchanged job stays where it is"


def test_another_model_forks_too_and_is_opened_once(tmp_path):
    class Other(EchoBackend):
        def __init__(self, folder):
            super().__init__(folder)
            self.fingerprint = {**self.fingerprint, "engine": "another"}

    run_echo(simple(tmp_path))
    moved = simple(tmp_path, model__path="moved", output__path=f"{tmp_path}/out/")
    for rows in (100, 0):
        summary = fork(moved, backend=Other)
        assert (summary.output, summary.run.rows) == (tmp_path / "out-2", rows)


def test_a_fork_that_is_stopped_before_it_begins_says_where_it_was_going(tmp_path):
    run_echo(simple(tmp_path))

    def signalled(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was lost")

    summary = fork(simple(tmp_path, sampling__max_tokens=3), backend=signalled)
    assert (summary.output, summary.state, summary.exit_code) == (tmp_path / "out-2", "stopped", 75)
    assert summary.reason == "SIGTERM" and not (tmp_path / "out-2.batchinfer").exists()


def test_a_complete_output_with_files_to_append_is_not_complete_when_it_is_stopped(tmp_path):
    add(tmp_path, "a.parquet", 10)
    run_echo(job(tmp_path))
    add(tmp_path, "b.parquet", 10)
    summary = run_echo(job(tmp_path, limits__deadline="2001-01-01T00:00"))
    assert (summary.state, summary.exit_code) == ("stopped", 75) and plans(tmp_path) == ["plan-000.parquet"]


def test_a_fork_never_goes_where_other_files_are_nor_reads_an_output(tmp_path):
    write(tmp_path / "data" / "in.parquet", texts(20))
    inside = {"input__path": str(tmp_path / "data"), "output__path": str(tmp_path / "data" / "out")}
    run_echo(echo_job(tmp_path, **inside))
    summary = fork(echo_job(tmp_path, sampling__max_tokens=3, **inside))
    assert (summary.output, summary.rows) == (tmp_path / "data" / "out-2", 20)
    assert run_echo(echo_job(tmp_path, **inside)).rows == 20
    write(tmp_path / "out-2" / "mine.parquet", texts(1))
    run_echo(simple(tmp_path))
    with pytest.raises(OutputError, match="out-2 is not empty"):
        fork(simple(tmp_path, sampling__max_tokens=3))


def test_the_flags_lead_there_too(tmp_path, demo_tokenizer_dir):
    words = ["run", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", DEMO_MODEL, "--json"]
    words += ["--template", "{{ text }}", "--set", "engine.backend=echo"]
    add(tmp_path, "a.parquet", 10)
    assert CliRunner().invoke(main, words).exit_code == 0
    add(tmp_path, "b.parquet", 5)
    assert CliRunner().invoke(main, words).exit_code == 4
    appended = CliRunner().invoke(main, [*words, "--on-input-change", "append"])
    assert appended.exit_code == 0 and json.loads(appended.stdout)["run"]["rows"] == 5
    assert CliRunner().invoke(main, [*words, "--max-tokens", "3"]).exit_code == 4
    forked = CliRunner().invoke(main, [*words, "--max-tokens", "3", "--fork"])
    assert forked.exit_code == 0 and json.loads(forked.stdout)["output"] == str(tmp_path / "out-2")


def test_changed_input_is_no_reason_to_fork(tmp_path):
    run_echo(simple(tmp_path))
    os.utime(tmp_path / "in.parquet", ns=(1, 1))
    with pytest.raises(DriftError, match="in.parquet was changed"):
        fork(simple(tmp_path))
    assert not (tmp_path / "out-2").exists()


def test_a_fork_keeps_a_plan_and_parts_of_its_own(tmp_path):
    run_echo(simple(tmp_path))
    fork(simple(tmp_path, sampling__max_tokens=3))
    with Ledger(tmp_path / "out-2") as ledger:
        assert ledger.verify() == 100
    fingerprints = {
        json.loads((tmp_path / f"{name}.batchinfer" / "job.json").read_bytes())["fingerprint"]
        for name in ("out", "out-2")
    }
    assert len(fingerprints) == 2
    assert pq.ParquetDataset(tmp_path / "out-2").read().num_rows == 100
