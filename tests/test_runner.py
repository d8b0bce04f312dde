"""A whole run over the echo backend: what goes in comes out, what fails says so, what stops can go on."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.backends.echo import EchoBackend
from batchinfer.data.ledger import Ledger
from batchinfer.data.report import first_rows
from batchinfer.data.store import LocalStore
from batchinfer.data.threads import Deadline
from batchinfer.errors import (
    DriftError,
    EngineError,
    ExitCode,
    InputError,
    IntegrityError,
    JobError,
    LockedError,
    ModelError,
    OutputError,
)  # fmt: skip
from tests.echo_jobs import echo_job, read_output, run_echo, texts, tokenizer_dir, write

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def in_time():
    """Whatever goes wrong, no run hangs and no thread of it stays."""
    before = set(threading.enumerate())  # a test before may leave a thread on purpose: an engine that hangs
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the run hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    deadline = time.monotonic() + 2
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    new = set(threading.enumerate()) - before
    assert [t.name for t in new if t.name.startswith("batchinfer")] == []


def simple(tmp_path, rows: int = 300, **changes):
    write(tmp_path / "in.parquet", texts(rows), row_group_size=100)
    return echo_job(tmp_path, **changes)


def test_every_row_comes_out_once_in_order_with_its_columns(tmp_path):
    summary = run_echo(simple(tmp_path))
    out = read_output(tmp_path)
    assert out.column_names == [
        "id", "text", "completion", "finish_reason", "prompt_tokens", "completion_tokens", "error",
    ]  # fmt: skip
    assert out.select(["id", "text"]).equals(texts(300))
    rows = out.to_pylist()
    assert all(row["prompt_tokens"] == len(f"Say {row['text']}") == row["completion_tokens"] for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop"} and len({row["completion"] for row in rows}) == 300
    assert (summary.state, summary.exit_code, summary.job.rows, summary.run.rows) == ("complete", 0, 300, 300)
    written = json.loads((tmp_path / "out.batchinfer" / "summary.json").read_bytes())
    assert written["job"]["rows"] == 300 and written["run"]["finish_reasons"] == {"stop": 300}
    assert {"generate", "feed.render", "journal.encode", "sink.commit"} <= written["stages"].keys()
    assert "300 rows" in str(summary) and "tok/s" in str(summary)
    assert os.listdir(tmp_path / "out.batchinfer" / "wal") == os.listdir(tmp_path / "out.batchinfer" / "staged") == []


def test_a_complete_job_returns_without_opening_the_model(tmp_path):
    job = simple(tmp_path)
    run_echo(job)
    begun = time.monotonic()
    summary = run_echo(job, backend=lambda folder: pytest.fail("the model was opened"))
    assert time.monotonic() - begun < 1
    assert summary.state == "complete" and summary.run.rows == 0 and "nothing left to do" in str(summary)


def test_a_complete_job_with_another_model_is_drift_but_the_same_model_elsewhere_is_not(tmp_path):
    run_echo(simple(tmp_path))
    moved = simple(tmp_path, model__path="moved")
    os.utime(tmp_path / "in.parquet", ns=(1, 1))  # simple() wrote it again
    with pytest.raises(DriftError, match="in.parquet was changed"):
        run_echo(moved)


def test_the_model_s_fingerprint_decides_when_its_path_changed(tmp_path):
    job = simple(tmp_path)
    run_echo(job)
    moved = job.model_copy(update={"model": job.model.model_copy(update={"path": "moved"})})

    class Other(EchoBackend):
        def __init__(self, folder):
            super().__init__(folder)
            self.fingerprint = {**self.fingerprint, "engine": "another"}

    with pytest.raises(DriftError, match="engine.engine: 'echo' -> 'another'"):
        run_echo(moved, Other)
    assert run_echo(moved).run.rows == 0


@pytest.mark.parametrize(
    "change",
    [{"sampling__max_tokens": 3}, {"prompt__template": "Other {{ text }}"}, {"output__prefix": "p_"}],
)
def test_a_changed_job_is_refused_with_the_difference(tmp_path, change):
    job = simple(tmp_path)
    run_echo(job)
    with pytest.raises(DriftError, match=next(iter(change)).replace("__", ".")) as drift:
        run_echo(echo_job(tmp_path, **change))
    assert drift.value.exit_code == 4


def test_operational_settings_may_change_between_runs(tmp_path):
    job = simple(tmp_path)
    stopped(job)
    again = echo_job(tmp_path, checkpoint__unit_rows=7, report__log_seconds=1.0, output__compression="none")
    assert run_echo(again).state == "complete"
    assert read_output(tmp_path)["id"].to_pylist() == list(range(300))


def test_partition_folders_of_the_input_are_those_of_the_output(tmp_path):
    for day in (1, 2):
        write(tmp_path / "in" / f"day={day}" / "x.parquet", texts(100))
    run_echo(echo_job(tmp_path, tmp_path / "in"))
    assert sorted(os.listdir(tmp_path / "out")) == ["day=1", "day=2"]
    import polars as pl

    counts = pl.scan_parquet(tmp_path / "out", hive_partitioning=True).group_by("day").len().sort("day").collect()
    assert counts.rows() == [(1, 100), (2, 100)]


def test_an_input_without_rows_gives_an_output_without_rows(tmp_path):
    summary = run_echo(simple(tmp_path, rows=0))
    assert summary.state == "complete" and summary.exit_code == 0
    assert read_output(tmp_path).column_names[:3] == ["id", "text", "completion"]


@pytest.mark.parametrize("unit_rows", [1, 7, 100, 10_000])
def test_units_of_any_size_give_the_same_rows(tmp_path, unit_rows):
    run_echo(simple(tmp_path, rows=120, checkpoint__unit_rows=unit_rows))
    assert read_output(tmp_path)["id"].to_pylist() == list(range(120))


def test_bad_rows_are_rows_and_never_reach_the_engine(tmp_path):
    table = pa.table({"text": ["good", None, "", "fine"] * 25})
    write(tmp_path / "in.parquet", table)
    seen = []

    class Watching(EchoBackend):
        def generate(self, requests):
            return super().generate(seen.append(r) or r for r in requests)

    summary = run_echo(echo_job(tmp_path, prompt__template="{{ text }}"), Watching)
    rows = read_output(tmp_path).to_pylist()
    assert sum(r is not None for r in seen) == 50
    for row in rows:
        bad = not row["text"]
        assert (row["finish_reason"] == "error") == (row["completion"] is None) == (row["error"] is not None) == bad
    assert summary.job.failed == 50 and summary.exit_code == ExitCode.OK and "(50 failed)" in str(summary)


def test_more_failed_rows_than_the_limit_end_in_exit_code_3_each_time(tmp_path):
    write(tmp_path / "in.parquet", pa.table({"text": ["good", None, None]}))
    job = echo_job(tmp_path)
    assert run_echo(job).exit_code == run_echo(job).exit_code == ExitCode.FAILED_ROWS


def test_several_completions_a_row_are_lists(tmp_path):
    run_echo(simple(tmp_path, rows=20, sampling__n=3, sampling__temperature=1.0, sampling__max_tokens=4))
    row = read_output(tmp_path).to_pylist()[7]
    assert row["completion_tokens"] == [4, 4, 4] and row["finish_reason"] == ["length"] * 3
    assert len(set(row["completion"])) == 3


def test_a_row_s_seed_is_its_own_and_the_same_in_every_run(tmp_path):
    outputs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "in.parquet", pa.table({"text": ["same"] * 50}))
        run_echo(echo_job(tmp_path / name, sampling__temperature=1.0, checkpoint__unit_rows=20 if name == "a" else 50))
        outputs.append(read_output(tmp_path / name)["completion"].to_pylist())
    assert outputs[0] == outputs[1] and len(set(outputs[0])) == 50


def test_only_the_columns_asked_for_are_carried_and_results_may_have_a_prefix(tmp_path):
    run_echo(simple(tmp_path, output__columns=["id"], output__prefix="llm_"))
    assert read_output(tmp_path).column_names == [
        "id", "llm_completion", "llm_finish_reason", "llm_prompt_tokens", "llm_completion_tokens", "llm_error",
    ]  # fmt: skip


def test_no_column_at_all_need_be_carried_or_asked_for(tmp_path):
    run_echo(simple(tmp_path, output__columns=[], prompt__template="the same for all"))
    assert read_output(tmp_path).num_rows == 300


def test_parts_say_in_their_footer_where_they_come_from(tmp_path):
    run_echo(simple(tmp_path, job__name="nightly"))
    part = sorted((tmp_path / "out").iterdir())[1]
    metadata = pq.read_schema(part).metadata
    assert metadata[b"batchinfer.job"] == b"nightly" and metadata[b"batchinfer.unit"] == b"1"
    assert len(metadata[b"batchinfer.fingerprint"]) == 64


def test_first_rows_shows_the_first_rows(tmp_path):
    run_echo(simple(tmp_path))
    assert first_rows(tmp_path / "out", 70)["id"].to_pylist() == list(range(70))
    assert first_rows(tmp_path / "out", 1000).num_rows == 300
    assert first_rows(tmp_path / "nowhere", 5).num_rows == 0


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"input__path": "/no/such.parquet"}, InputError, "no input at /no/such.parquet"),
        ({"prompt__template": "{{ txt }}"}, InputError, "'txt'.*did you mean 'text'"),
        ({"output__columns": ["idd"]}, InputError, "'idd'.*did you mean 'id'"),
        ({"output__path": "/proc/nowhere/out"}, OutputError, "/proc/nowhere"),
    ],
)
def test_what_cannot_work_is_told_before_anything_runs(tmp_path, changes, error, said):
    with pytest.raises(error, match=said) as told:
        run_echo(simple(tmp_path, **changes), backend=lambda folder: pytest.fail("the model was opened"))
    assert told.value.exit_code == 2 and os.listdir(tmp_path) == ["in.parquet"]


def test_an_id_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        InputError, match="input.id_column needs column 'ids', which the input lacks; did you mean 'id'"
    ):
        run_echo(simple(tmp_path, input__id_column="ids"))


def test_an_input_column_named_like_a_result_is_refused_with_the_way_out(tmp_path):
    write(tmp_path / "in.parquet", pa.table({"text": ["a"], "completion": ["mine"], "llm_error": [1]}))
    with pytest.raises(JobError, match="'completion'.*output.prefix.*llm2_.*output.columns"):
        run_echo(echo_job(tmp_path))
    run_echo(echo_job(tmp_path, output__prefix="llm2_"))
    assert read_output(tmp_path)["completion"].to_pylist() == ["mine"]


def test_a_model_that_cannot_be_opened_leaves_no_trace(tmp_path):
    def missing(folder):
        raise ModelError("no weights")

    with pytest.raises(ModelError):
        run_echo(simple(tmp_path), missing)
    assert os.listdir(tmp_path) == ["in.parquet"]


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    job = simple(tmp_path)
    with Ledger(job.output.path), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        run_echo(job)


# ---- stopping


class Stopping(EchoBackend):
    """Sends signals to its own process once it has answered some rows; keeps some rows under way."""

    signals = 1
    after = 120
    held = 16

    def generate(self, requests):
        held = []
        for count, completion in enumerate(super().generate(requests)):
            held.append(completion)
            if count == self.after:
                for _ in range(self.signals):
                    os.kill(os.getpid(), signal.SIGTERM)
            if len(held) > self.held:
                yield held.pop(0)
        yield from held


def stopped(job, **changes):
    return run_echo(job, type("Stopping", (Stopping,), changes))


def test_a_signal_drains_what_is_under_way_and_a_rerun_goes_on_from_there(tmp_path, capfd):
    before = signal.getsignal(signal.SIGTERM)
    job = simple(tmp_path)
    summary = stopped(job)
    assert signal.getsignal(signal.SIGTERM) == before
    assert (summary.state, summary.exit_code) == ("stopped", 75)
    assert summary.run.rows == 121 and summary.job.rows == 64, "one unit is complete, all drained rows are kept"
    assert summary.logged == 121 - 64 and str(summary).startswith("121 of 300 rows")
    assert "again to stop at once" in capfd.readouterr().err and "run again to go on" in str(summary)
    again = run_echo(job)
    assert again.run.rows == 300 - 121 and again.job.rows == 300
    assert read_output(tmp_path)["id"].to_pylist() == list(range(300))


def test_a_second_signal_ends_at_once_with_what_is_finished(tmp_path):
    job = simple(tmp_path)
    summary = stopped(job, signals=2)
    assert summary.exit_code == 75 and 121 - Stopping.held - 2 <= summary.run.rows < 121
    again = run_echo(job)
    assert again.run.rows == 300 - summary.run.rows
    assert read_output(tmp_path)["id"].to_pylist() == list(range(300))


def test_a_signal_while_the_model_opens_ends_at_once(tmp_path):
    def slow(folder):
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal was lost")

    summary = run_echo(simple(tmp_path), slow)
    assert summary.exit_code == 75 and os.listdir(tmp_path) == ["in.parquet"]


def test_a_resumed_run_that_is_stopped_at_its_start_tells_how_far_the_job_is(tmp_path):
    job = simple(tmp_path)
    stopped(job)

    def slow(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        return pytest.fail("the signal was not heard")

    summary = run_echo(job, slow)
    assert (summary.state, summary.exit_code, summary.rows) == ("stopped", 75, 300) and summary.job.rows == 64


def test_a_run_off_the_main_thread_works_without_signals(tmp_path):
    job = simple(tmp_path)
    told = []
    thread = threading.Thread(target=lambda: told.append(run_echo(job)))
    thread.start()
    thread.join()
    assert told[0].state == "complete"


# ---- failing


def test_an_engine_that_dies_keeps_what_it_finished(tmp_path):
    class Dying(EchoBackend):
        def generate(self, requests):
            for count, completion in enumerate(super().generate(requests)):
                if count == 100:
                    raise EngineError("out of memory")
                yield completion

    job = simple(tmp_path)
    with pytest.raises(EngineError, match="out of memory"):
        run_echo(job, Dying)
    again = run_echo(job)
    assert again.run.rows == 200 and read_output(tmp_path)["id"].to_pylist() == list(range(300))


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("template", ["Say {{ text }}", "Say nothing of the row"])
def test_rows_with_gaps_between_them_are_taken_up_again_whatever_their_columns_are(tmp_path, kind, template):
    class Dying(EchoBackend):
        def generate(self, requests):
            yield from (c for i, c in enumerate(super().generate(requests)) if i % 3 == 0)
            raise EngineError("out of memory")

    write(tmp_path / "in.parquet", pa.table({"text": pa.array([f"row {i}" for i in range(100)]).cast(kind)}))
    job = echo_job(tmp_path, prompt__template=template)
    with pytest.raises(EngineError, match="out of memory"):
        run_echo(job, Dying)
    assert run_echo(job).run.rows == 66
    out = read_output(tmp_path)
    assert out["error"].null_count == out.num_rows == 100


def test_an_engine_that_forgets_rows_or_answers_twice_is_found_out(tmp_path):
    class Forgetful(EchoBackend):
        def generate(self, requests):
            return (c for i, c in enumerate(super().generate(requests)) if i % 50)

    class Stammering(EchoBackend):
        def generate(self, requests):
            return (c for c in super().generate(requests) for _ in range(1 + (c.key[1] == 50)))

    job = simple(tmp_path)
    with pytest.raises(EngineError, match="6 requests unanswered"):
        run_echo(job, Forgetful)
    with pytest.raises(EngineError, match="twice"):
        run_echo(job, Stammering)
    run_echo(job)
    assert read_output(tmp_path)["id"].to_pylist() == list(range(300))


def test_damaged_input_ends_the_run_by_name_and_keeps_the_rows_before_it(tmp_path):
    job = simple(tmp_path, rows=3000)
    path = tmp_path / "in.parquet"
    data = bytearray(path.read_bytes())
    middle = pq.read_metadata(path).row_group(20).column(1).data_page_offset
    data[middle : middle + 500] = bytes(500)
    path.write_bytes(data)
    with pytest.raises(InputError, match="in.parquet cannot be read"):
        run_echo(job)
    done = read_output(tmp_path)
    assert done["id"].to_pylist() == list(range(done.num_rows)) and done.num_rows >= 1500


class Failing(LocalStore):
    """Raises an OSError on the n-th write of a kind."""

    kind = ""
    left = 0

    def _write(self, name, data, flags):
        if name.startswith(self.kind):
            type(self).left -= 1
            if self.left < 0:
                self.path(name).write_bytes(bytes(data)[: len(data) // 2])  # what a full disk leaves
                plain, os.fsync = os.fsync, _full
                try:
                    super()._write(f"{name}.partial", data, flags)
                finally:
                    os.fsync = plain
        super()._write(name, data, flags)


def _full(fd):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", ["staged/", "commits/", "wal/", "job.json", "plan-000", "leases/", "summary.json"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path, monkeypatch, kind, after):
    monkeypatch.setattr("batchinfer.runner.Ledger", lambda path, shard=None: Ledger(path, Broken, shard))
    Broken = type("Broken", (Failing,), {"kind": kind, "left": after})

    class Slow(EchoBackend):
        """Slow enough for rows to be logged."""

        def generate(self, requests):
            for count, completion in enumerate(super().generate(requests)):
                if count % 25 == 0:
                    time.sleep(0.03)
                yield completion

    job = simple(tmp_path)
    try:
        run_echo(job, Slow)
        assert after and kind in ("job.json", "plan-000", "leases/", "summary.json"), "the fault was not met"
    except OutputError as error:
        begun = after or kind not in ("job.json", "plan-000", "leases/")
        assert (
            error.exit_code == (75 if begun else 2)
            and "No space left on device" in str(error)
            and "Nothing committed is lost" in str(error)
        )
    monkeypatch.undo()
    run_echo(job)
    assert read_output(tmp_path)["id"].to_pylist() == list(range(300))


def test_a_signal_at_the_very_beginning_is_an_early_stop_as_well(tmp_path, monkeypatch):
    class Signalled(Deadline):
        def __init__(self, *args):
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*args)

    monkeypatch.setattr("batchinfer.runner.Deadline", Signalled)
    summary = run_echo(simple(tmp_path))
    assert (summary.state, summary.exit_code, summary.reason) == ("stopped", 75, "SIGTERM")


def test_a_missing_part_is_an_integrity_error(tmp_path):
    job = simple(tmp_path)
    run_echo(job)
    next((tmp_path / "out").iterdir()).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        run_echo(job)


# ---- the line to the engine


def test_an_engine_is_never_kept_waiting_while_it_has_rows_under_way(tmp_path):
    """A backend that holds rows gets None at once; one that holds none waits a moment, so that it does not spin."""
    gaps = {"holding": [], "idle": []}

    class Pulling(EchoBackend):
        def generate(self, requests):
            held = []
            while True:
                begun = time.perf_counter()
                request = next(requests, "end")
                if request is None:
                    gaps["holding" if held else "idle"].append(time.perf_counter() - begun)
                if request is None or request == "end":
                    yield from super().generate(iter(held[:5]))
                    del held[:5]
                    if request == "end" and not held:
                        return
                elif request != "end":
                    held.append(request)

    run_echo(simple(tmp_path, rows=2000), Pulling)
    assert len(gaps["idle"]) < 200
    assert sorted(gaps["holding"])[len(gaps["holding"]) // 2] < 0.001 if gaps["holding"] else True


def test_rows_held_between_input_and_output_are_bounded(tmp_path, monkeypatch):
    from batchinfer.data import feed

    monkeypatch.setattr(feed, "IN_FLIGHT", (256, 1 << 30))
    pulled = []

    class Hoarding(EchoBackend):
        """Answers nothing while there is more to pull."""

        def generate(self, requests):
            held = []
            for request in requests:
                if request is None and held:
                    pulled.append(len(held))
                    yield from super().generate(iter(held))
                    held = []
                elif request is not None:
                    held.append(request)
            yield from super().generate(iter(held))

    run_echo(simple(tmp_path, rows=2000), Hoarding)
    assert read_output(tmp_path).num_rows == 2000 and max(pulled) <= 256


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    """160 MB of columns that are only carried along, in one row group, against a thirtieth of it."""
    script = (
        "import sys; from pathlib import Path; from tests.echo_jobs import *; from batchinfer.data import feed\n"
        "feed.IN_FLIGHT = (2048, 8 << 20)\n"
        "print(run_echo(echo_job(Path(sys.argv[1]))).peak_rss)"
    )
    peaks = []
    for name, rows in (("small", 1333), ("big", 40_000)):
        payload = pa.array([os.urandom(4096) for _ in range(rows)])
        write(tmp_path / name / "in.parquet", texts(rows).append_column("payload", payload), row_group_size=rows)
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        peaks.append(int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 80 << 20, peaks


def test_the_echo_backend_is_deterministic_and_stays_within_max_tokens():
    from batchinfer.request import Request, SamplingParams

    requests = [Request(i, [1, 2, 3, i], SamplingParams(max_tokens=3, temperature=1.0, seed=i)) for i in range(5)]
    first, second = (list(EchoBackend(tokenizer_dir()).generate(iter(requests))) for _ in range(2))
    assert first == second and len({c.outputs[0].text for c in first}) == 5
    assert all(len(c.outputs[0].token_ids) == 3 and c.outputs[0].finish_reason == "length" for c in first)
