from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone

import pytest
from click.testing import CliRunner

from batchinfer.backends.echo import EchoBackend
from batchinfer.cli import main
from batchinfer.deadline import ends_at, moment, seconds
from batchinfer.errors import ExitCode, JobError
from batchinfer.job import Job
from tests.conftest import DEMO_MODEL
from tests.echo_jobs import echo_job, read_output, run_echo, texts, write

NOON = datetime(2031, 5, 6, 12, 0)


@pytest.mark.parametrize(
    "text, wanted", [("4h", 14400), ("90m", 5400), ("1h30m", 5400), ("1h 30m", 5400), ("1.5h", 5400), ("2d1s", 172801)]
)
def test_spans_are_written_with_units(text, wanted):
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "4", "h", "0s", "-1h", "30m1h", "4 hours", "1e3s", "999999d"])
def test_what_is_no_span_is_refused(text):
    with pytest.raises(ValueError, match='such as "4h".*got'):
        seconds(text)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("13:30", NOON.replace(hour=13, minute=30)),
        ("06:00", NOON.replace(day=7, hour=6)),
        ("6:00:30", NOON.replace(day=7, hour=6, second=30)),
        ("12:00", NOON.replace(day=7)),
        ("2031-05-06T23:00", NOON.replace(hour=23)),
        ("2031-05-06 11:00:01", NOON.replace(hour=11, second=1)),
        ("2031-05-06T23:00Z", datetime(2031, 5, 6, 23, tzinfo=timezone.utc)),
        ("2031-05-06T23:00+02:00", datetime(2031, 5, 6, 21, tzinfo=timezone.utc)),
    ],
)
def test_a_time_of_day_is_the_next_one_and_a_date_is_itself(text, wanted):
    assert moment(text, NOON) == wanted.astimezone()


@pytest.mark.parametrize("text", ["", "6", "24:00", "06:61", "tomorrow", "2031-05-06", "2031-13-06T01:00", "6am"])
def test_what_is_no_moment_is_refused(text):
    with pytest.raises(ValueError, match='such as "06:00".*got'):
        moment(text, NOON)


def test_the_earlier_of_both_counts():
    assert ends_at(None, None) is None
    at, why = ends_at("2999-01-01T00:00", "2h")
    assert why == "max_time 2h reached" and abs(at - time.time() - 7200) < 5
    assert ends_at("2001-01-01T06:00", "2h")[1] == "deadline 2001-01-01 06:00 reached"


@pytest.mark.parametrize(
    "key, value", [("deadline", "soon"), ("deadline", "25:00"), ("max_time", "4"), ("max_time", 4)]
)
def test_a_wrong_value_is_told_when_the_job_is_loaded(tmp_path, key, value):
    with pytest.raises(JobError, match=rf"limits.{key} \(command line\).*got '?{value}"):
        Job.load(None, _keys(tmp_path) | {f"limits.{key}": value}, {})


def test_a_toml_time_and_a_toml_date_will_do(tmp_path):
    file = tmp_path / "job.toml"
    for written, kept in (("06:00:00", "06:00:00"), ("2031-05-06T06:00:00Z", "2031-05-06T06:00:00+00:00")):
        file.write_text(f"[limits]\ndeadline = {written}\n")
        assert Job.load(file, _keys(tmp_path), {}).limits.deadline == kept


def _keys(folder):
    named = {"input.path": "in", "prompt.template": "t", "model.path": "m"}
    return named | {"output.path": str(folder / "out")}


def test_the_flags_say_what_is_wrong_with_them_and_stop_a_run(tmp_path, demo_tokenizer_dir):
    words = ["run", "-i", str(write(tmp_path / "in.parquet", texts(5))), "-o", str(tmp_path / "out"), "-m", DEMO_MODEL]
    words += ["--template", "{{ text }}", "--set", "engine.backend=echo"]
    for flag, value in (("--deadline", "noon"), ("--max-time", "long")):
        refused = CliRunner().invoke(main, [*words, flag, value])
        assert refused.exit_code == 2 and "(command line): must be a time" in refused.stderr
    late = CliRunner().invoke(main, [*words, "--deadline", "2001-01-01T06:00"])
    assert late.exit_code == 75 and "stopped early (deadline 2001-01-01 06:00 reached)" in late.stdout
    assert CliRunner().invoke(main, [*words, "--deadline", "06:00", "--max-time", "1h30m"]).exit_code == 0


class Slow(EchoBackend):
    """A few hundred rows a second, of which some are always under way."""

    def generate(self, requests):
        held = []
        for completion in super().generate(requests):
            time.sleep(0.002)
            held.append(completion)
            if len(held) > 16:
                yield held.pop(0)
        yield from held


def test_at_the_deadline_rows_under_way_are_finished_and_a_rerun_goes_on(tmp_path, capfd):
    write(tmp_path / "in.parquet", texts(600))
    summary = run_echo(echo_job(tmp_path, limits__max_time="0.4s"), Slow)
    assert (summary.state, summary.exit_code, summary.reason) == ("stopped", 75, "max_time 0.4s reached")
    assert 0 < summary.run.rows < 600 and summary.job.rows + summary.logged == summary.run.rows
    assert "stopped early (max_time 0.4s reached), run again to go on" in str(summary)
    assert summary.as_dict()["reason"] == "max_time 0.4s reached"
    assert "max_time 0.4s reached, stopping once the rows under way" in capfd.readouterr().err
    again = run_echo(echo_job(tmp_path, limits__deadline="2999-01-01T00:00"))
    assert (again.state, again.reason, again.run.rows) == ("complete", "", 600 - summary.run.rows)
    assert read_output(tmp_path)["id"].to_pylist() == list(range(600))


def test_a_deadline_that_is_past_stops_before_the_model_opens_and_a_complete_job_does_not_mind(tmp_path):
    write(tmp_path / "in.parquet", texts(10))
    past = (datetime.now() - timedelta(hours=1)).isoformat(timespec="seconds")
    late = echo_job(tmp_path, limits__deadline=past)
    summary = run_echo(late, lambda folder: pytest.fail("the model was opened"))
    assert (summary.state, summary.exit_code) == ("stopped", ExitCode.STOPPED) and "deadline" in str(summary)
    assert not (tmp_path / "out").exists()
    run_echo(echo_job(tmp_path))
    assert run_echo(late).state == "complete"


def test_a_deadline_reached_while_the_model_opens_takes_up_no_row(tmp_path):
    def opening(folder):
        time.sleep(0.3)
        return EchoBackend(folder)

    write(tmp_path / "in.parquet", texts(100))
    summary = run_echo(echo_job(tmp_path, limits__max_time="0.1s"), opening)
    assert (summary.state, summary.run.rows, summary.rows) == ("stopped", 0, 100)
