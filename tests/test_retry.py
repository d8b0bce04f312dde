"""Retry: chosen rows are answered again, their results take the place of the old ones, and all else stays."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from unittest import mock

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchinfer.backends.echo import EchoBackend
from batchinfer.cli import main
from batchinfer.data.ledger import Ledger
from batchinfer.data.standing import standing
from batchinfer.data.superseding import ranges
from batchinfer.data.vacuum import vacuum
from batchinfer.errors import InputError, IntegrityError, JobDriftError, JobError, LockedError
from batchinfer.request import Completion
from batchinfer.retrier import dry_run, retry
from tests.echo_jobs import echo_job, read_output, retry_echo, run_echo, texts, write

ROWS = 200
LONG = "finish_reason = 'length'"


class Refusing(EchoBackend):
    """Fails the rows whose prompt ends in 7."""

    def generate(self, requests):
        for completion in super().generate(requests):
            failed = completion.key[1] % 10 == 7
            yield Completion(completion.key, error="out of luck") if failed else completion


@pytest.fixture
def job(tmp_path):
    """A job that is done: every completion cut short, every row of a unit whose number ends in 7 failed."""
    write(tmp_path / "in" / "day=1" / "a.parquet", texts(ROWS), row_group_size=50)
    write(tmp_path / "in" / "day=2" / "b.parquet", texts(30))
    job = echo_job(tmp_path, tmp_path / "in", sampling__max_tokens=5)
    run_echo(job, Refusing)
    return job


def again(job, where=LONG, backend=EchoBackend, **settings):
    return retry_echo(job, where, {key.replace("__", "."): value for key, value in settings.items()}, backend)


def parts(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in (folder / "out").rglob("*.parquet")}


def stop_after(count: int):
    class Stopping(EchoBackend):
        def generate(self, requests):
            for number, completion in enumerate(super().generate(requests)):
                yield completion
                if number == count:
                    os.kill(os.getpid(), signal.SIGTERM)

    return Stopping


def test_chosen_rows_are_answered_anew_and_all_others_keep_what_they_had(tmp_path, job):
    before, names = read_output(tmp_path), parts(tmp_path).keys()
    summary = again(job, f"{LONG} AND id < 10 AND day = 1", sampling__max_tokens=8)
    assert (summary.state, summary.exit_code, summary.run.rows) == ("complete", 0, 9)
    assert (summary.retry["rows"], summary.retry["superseded"], summary.retry["kept"]) == (9, 9, 0)
    after = read_output(tmp_path)
    assert parts(tmp_path).keys() == names and after.schema.equals(before.schema)
    chosen = [i < 10 and i != 7 for i in range(ROWS + 30)]
    assert after.filter(pa.array([not c for c in chosen])).equals(before.filter(pa.array([not c for c in chosen])))
    assert after["completion_tokens"].filter(pa.array(chosen)).to_pylist() == [8] * 9
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.verify() == ROWS + 30
    assert vacuum(tmp_path / "out", dry_run=True).foreign == []


def test_by_default_the_failed_rows_are_chosen_and_an_output_says_which_job_it_is_of(tmp_path, job):
    assert read_output(tmp_path)["error"].null_count == 230 - 22
    summary = again(str(tmp_path / "out"), None)
    assert summary.retry["superseded"] == 22 and summary.job.failed == 0
    assert read_output(tmp_path)["error"].null_count == 230
    nothing = again(tmp_path / "out", None, lambda folder: pytest.fail("the model was opened"))
    assert nothing.exit_code == 0 and str(nothing).startswith('no row to retry, none has "error" IS NOT NULL')


def test_a_row_that_fails_again_keeps_its_completion_and_a_failed_one_gets_the_new_reason(tmp_path, job):
    class Worse(EchoBackend):
        def generate(self, requests):
            for completion in super().generate(requests):
                yield Completion(completion.key, error="worse luck")

    before = read_output(tmp_path)
    summary = again(job, "id < 10", Worse)
    assert (summary.retry["rows"], summary.retry["superseded"], summary.retry["kept"]) == (20, 2, 18)
    after = read_output(tmp_path)
    assert after.drop_columns(["error"]).equals(before.drop_columns(["error"]))
    assert {e for e in after["error"].to_pylist() if e} == {"out of luck", "worse luck"}
    assert after["error"].to_pylist()[7] == "worse luck" and "18 failed and kept what they had" in str(summary)
    assert again(job, "id < 10", Worse).retry["retry"] == 2, "a retry that is done is no reason not to try again"


def test_the_job_stays_complete_and_its_manifest_knows_the_new_parts(tmp_path, job):
    control = tmp_path / "out.batchinfer"
    again(job, sampling__max_tokens=8)
    again(job, "id = 3", sampling__max_tokens=9)
    summary = run_echo(job, lambda folder: pytest.fail("the model was opened"))
    assert (summary.state, summary.run.rows) == ("complete", 0)
    assert set(read_output(tmp_path)["completion_tokens"].to_pylist()) == {None, 8, 9}
    manifest, identity = (json.loads((control / name).read_bytes()) for name in ("manifest.json", "job.json"))
    assert manifest["retries"] == identity["retries"]
    told = [(r["retry"], r["where"], r["set"]) for r in manifest["retries"]]
    assert told == [(1, LONG, {"sampling.max_tokens": 8}), (2, "id = 3", {"sampling.max_tokens": 9})]
    assert len({identity["fingerprint"], *(r["fingerprint"] for r in manifest["retries"])}) == 3
    assert [part.get("retry") for part in manifest["parts"]] == [2, 1, 1, 1, 2]
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.verify() == 230


def test_a_part_s_footer_says_which_rows_each_retry_answered(tmp_path, job):
    again(job, "id IN (0, 1, 2, 5, 7)", Refusing, sampling__max_tokens=8)
    again(job, "id = 1 AND day = 1", prompt__template="Anew {{ text }}")
    part = sorted((tmp_path / "out" / "day=1").iterdir())[0]
    metadata = pq.read_schema(part).metadata
    first, second = json.loads(metadata[b"batchinfer.retries"])
    assert (first["rows"], second["rows"]) == ("0-2,5,7", "1") and second["set"] == {
        "prompt.template": "Anew {{ text }}"
    }
    assert metadata[b"batchinfer.unit"] == b"0" and b"batchinfer.fingerprint" in metadata


def test_an_interrupted_retry_is_taken_up_again_by_the_same_command(tmp_path, job):
    where, settings = f"{LONG} OR error IS NOT NULL", {"sampling__max_tokens": 8, "checkpoint__sync_rows": 1}
    stopped = again(job, where, stop_after(100), **settings)
    assert (stopped.state, stopped.exit_code) == ("stopped", 75) and stopped.retry["superseded"] == 64
    assert "left, retry it again to go on" in str(standing(tmp_path / "out"))
    assert run_echo(job).state == "complete", "the job itself is"
    half = read_output(tmp_path)["completion_tokens"].to_pylist()
    assert half[:64] == [8] * 64 and 8 not in half[64:], "each part is of before or of after"
    assert "(left of retry 1" in str(dry_run(job, where, {"sampling.max_tokens": 8}))
    done = again(job, where, **settings)
    assert done.retry["retry"] == 1 and done.state == "complete" and done.retry["superseded"] == 230
    assert stopped.run.rows + done.run.rows == 230, "no row was computed twice"
    assert read_output(tmp_path)["completion_tokens"].to_pylist() == [8] * 230
    assert os.listdir(tmp_path / "out.batchinfer" / "wal") == os.listdir(tmp_path / "out.batchinfer" / "staged") == []


def test_another_command_leaves_an_interrupted_retry_as_it_is(tmp_path, job):
    again(job, "id < 500", stop_after(100), sampling__max_tokens=8, checkpoint__sync_rows=1)
    other = again(job, "day = 2", sampling__max_tokens=9)
    assert other.retry["retry"] == 2 and other.run.rows == 30
    assert read_output(tmp_path)["completion_tokens"].to_pylist()[:64] == [8] * 64
    assert run_echo(job).state == "complete"
    assert os.listdir(tmp_path / "out.batchinfer" / "wal") == []


def test_an_unfinished_output_is_retried_as_far_as_it_is_and_then_finished(tmp_path):
    write(tmp_path / "in.parquet", texts(ROWS))
    job = echo_job(tmp_path, sampling__max_tokens=5)
    assert run_echo(job, stop_after(100)).exit_code == 75
    summary = again(job, sampling__max_tokens=8)
    assert (summary.exit_code, summary.retry["rows"]) == (0, 64)
    assert not (tmp_path / "out.batchinfer" / "_SUCCESS").exists()
    logged = 37  # rows of the second unit, in the job's own log, which a retry leaves alone
    assert run_echo(job).run.rows == ROWS - 64 - logged
    assert read_output(tmp_path)["completion_tokens"].to_pylist() == [8] * 64 + [5] * (ROWS - 64)


def test_a_seed_is_that_of_the_row_s_address(tmp_path):
    write(tmp_path / "in.parquet", texts(100), row_group_size=30)
    job = echo_job(tmp_path, sampling__temperature=1.0, input__filter="id % 3 = 0")
    run_echo(job)
    before = parts(tmp_path)
    assert again(job, "id > 40 AND id % 2 = 0").run.rows == 10
    rows = [pl.read_parquet(data).to_dicts() for data in (before.popitem()[1], parts(tmp_path).popitem()[1])]
    assert rows[0] == rows[1]


def test_several_completions_a_row_are_superseded_as_one(tmp_path):
    write(tmp_path / "in.parquet", texts(20))
    job = echo_job(tmp_path, sampling__n=2, sampling__max_tokens=4, output__prefix="p_")
    run_echo(job)
    again(job, "array_contains(p_finish_reason, 'length') AND id = 2", sampling__max_tokens=6)
    assert read_output(tmp_path)["p_completion_tokens"].to_pylist()[1:4] == [[4, 4], [6, 6], [4, 4]]


@pytest.mark.parametrize(
    "where, said",
    [
        ("finished = 'length'", "--where needs column 'finished', which the output lacks; did you mean"),
        ("finish_reason", "--where must be true or false"),
        ("id >", "--where is not a condition in SQL"),
        ("id > (SELECT 1)", "--where "),
        ("sum(id) > 3", "--where must look at one row alone"),
    ],
)
def test_a_condition_that_cannot_serve_is_refused_and_nothing_changes(tmp_path, job, where, said):
    before = parts(tmp_path)
    for act in (dry_run, again):
        with pytest.raises((JobError, InputError), match=said):
            act(job, where)
    assert parts(tmp_path) == before and (tmp_path / "out.batchinfer" / "_SUCCESS").exists()


@pytest.mark.parametrize("key", ["sampling.n", "output.prefix", "input.filter", "output.path", "job.name"])
def test_what_would_change_a_row_s_place_or_columns_cannot_be_set(job, key):
    with pytest.raises(JobError, match=f"a retry cannot set {key}"):
        retry(job, LONG, {key: 3})


def test_all_but_what_is_set_must_equal_the_job(tmp_path, job):
    with pytest.raises(JobDriftError, match="prompt.template"):
        again(echo_job(tmp_path, tmp_path / "in", sampling__max_tokens=5, prompt__template="{{ id }}"))

    class Other(EchoBackend):
        def __init__(self, folder):
            super().__init__(folder)
            self.fingerprint = {**self.fingerprint, "engine": "another"}

    with pytest.raises(JobDriftError, match=r"(?s)engine.engine: 'echo' -> 'another'.*--set model.path"):
        again(job, LONG, Other)
    assert again(job, "id = 1", Other, model__path="another").retry["superseded"] == 2


def test_nothing_was_begun(tmp_path):
    write(tmp_path / "in.parquet", texts(3))
    for job in (echo_job(tmp_path), tmp_path / "out"):
        with pytest.raises(JobError, match="no job was begun"):
            again(job)
    assert os.listdir(tmp_path) == ["in.parquet"]


def test_a_retry_and_a_run_exclude_each_other(tmp_path, job):
    with Ledger(tmp_path / "out"), pytest.raises(LockedError, match="is being written by another run"):
        again(job)


def test_a_damaged_part_is_not_superseded_as_if_it_were_whole(tmp_path, job):
    part = sorted((tmp_path / "out" / "day=2").iterdir())[0]
    data = bytearray(part.read_bytes())
    data[8] ^= 1
    part.write_bytes(data)
    for where in ("day = 2 AND id < 3", LONG, "id < 3"):
        with pytest.raises(IntegrityError, match="part-00000"):
            again(job, where)
    assert part.read_bytes() == bytes(data)


def test_with_the_lock_bypassed_two_retries_never_undo_each_other(tmp_path, job):
    class Late(EchoBackend):
        """While it works, another retry supersedes the same rows."""

        def generate(self, requests):
            again(job, "id = 0 AND day = 1", sampling__max_tokens=9)
            yield from super().generate(requests)

    with mock.patch("fcntl.flock"), pytest.raises(LockedError, match="has just superseded .* run again"):
        again(job, "id < 2 AND day = 1", Late, sampling__max_tokens=8)
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.verify() == 230
    assert read_output(tmp_path)["completion_tokens"].to_pylist()[:2] == [9, 5]


def test_a_dry_run_counts_and_does_nothing(tmp_path, job):
    before = {p: p.read_bytes() for p in (tmp_path / "out.batchinfer").rglob("*") if p.is_file()}
    with Ledger(tmp_path / "out"):
        chosen = dry_run(tmp_path / "out")
    assert dataclasses.astuple(chosen)[2:] == (22, 5, 230, None)
    assert str(chosen).startswith("22 of 230 rows in 5 parts would be answered again: ")
    after = {p: p.read_bytes() for p in (tmp_path / "out.batchinfer").rglob("*") if p.is_file()}
    assert {p.name for p in before.keys() ^ after.keys()} <= {"lock"}


def test_the_command_line_leads_there(tmp_path, demo_tokenizer_dir):
    write(tmp_path / "in.parquet", texts(20))
    words = ["-i", str(tmp_path / "in.parquet"), "-o", str(tmp_path / "out"), "-m", "smollm2-135m-instruct"]
    settings = ["--template", "{{ text }}", "--max-tokens", "4", "--set", "engine.backend=echo", "-q"]
    assert CliRunner().invoke(main, ["run", *words, *settings]).exit_code == 0
    words = ["retry", str(tmp_path / "out"), "--where", f"{LONG} AND id < 5", "--set", "sampling.max_tokens=6"]
    counted = CliRunner().invoke(main, [*words, "--dry-run", "--json"])
    assert counted.exit_code == 0 and json.loads(counted.stdout)["rows"] == 5
    assert CliRunner().invoke(main, [*words, "--max-time", "0s"]).exit_code in (2, 75)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and done.stdout.startswith("retry 1: 5 of 5 rows superseded · ")
    status = CliRunner().invoke(main, ["status", str(tmp_path / "out")])
    assert "retry 1: 5 of 5 rows superseded" in status.stdout
    wrong = CliRunner().invoke(main, ["retry", str(tmp_path / "out"), "--where", "reason = 1"])
    assert wrong.exit_code == 2 and "which the output lacks" in wrong.stderr


def test_ranges_of_rows_are_short():
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
