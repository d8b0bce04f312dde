"""What `status` tells of a job: how far, how fast, and why rows failed."""

from __future__ import annotations

import time

import pytest

from batchinfer.backends.echo import EchoBackend
from batchinfer.data import series
from batchinfer.data.standing import standing
from batchinfer.request import Completion
from tests.echo_jobs import echo_job, run_echo, texts, write

ROWS = 400


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(series, "GAP", (0.01, 0.01))
    write(tmp_path / "in.parquet", texts(ROWS))
    return tmp_path


class Failing(EchoBackend):
    """Has no luck with every fifth row."""

    def generate(self, requests):
        for number, completion in enumerate(super().generate(requests)):
            yield Completion(completion.key, error=f"attempt {number}: no luck") if number % 5 == 0 else completion


def test_a_run_at_work_has_a_pace_and_a_time_left(folder):
    seen = []

    class Looking(Failing):
        def generate(self, requests):
            for number, completion in enumerate(super().generate(requests)):
                yield completion
                while number == ROWS // 2 and not (seen and seen[-1].pace):
                    time.sleep(0.02)
                    seen.append(standing(folder / "out"))

    run_echo(echo_job(folder), Looking)
    found = seen[-1]
    assert found.state == "running" and found.as_dict()["pace"]["tokens_per_second"] > 0
    left = ROWS - found.as_dict()["job"]["rows"]
    assert found.pace.remaining_seconds == pytest.approx(left / found.pace.rows_per_second)
    assert "rows/s" in str(found) and " left" in str(found)


def test_failures_are_told_by_reason_and_what_is_done_has_no_pace(folder):
    run_echo(echo_job(folder), Failing)
    found = standing(folder / "out")
    assert found.pace is None and found.as_dict()["job"]["failures"] == {"attempt N: no luck": ROWS // 5}
    assert "  80 failed: attempt N: no luck" in str(found).splitlines()
