"""What a build learns of a job's rows."""

from __future__ import annotations

import pyarrow as pa
import pytest

from batchinfer.data.calibration import lengths, prompts
from tests.echo_jobs import echo_job, tokenizer_dir, write


@pytest.fixture(autouse=True)
def bytes_for_tokens(monkeypatch):
    """Every model's tokenizer is the one whose tokens are bytes."""
    monkeypatch.setattr("batchinfer.engine.model.tokenizer.export_tokenizer", lambda model: tokenizer_dir())


def test_rows_are_as_long_as_they_come_and_those_that_cannot_be_asked_are_left_out(tmp_path):
    write(tmp_path / "in.parquet", pa.table({"text": ["four", None, "x" * 300]}))
    job = echo_job(tmp_path)
    long, short = (len(ids) for ids in sorted(prompts(job), key=len, reverse=True))
    assert long - short == 296
    found = lengths(job)
    assert sorted(found.prompts) == [short, long]
    assert found.completions == (job.sampling.max_tokens,) * 2


def test_a_job_without_rows_has_no_lengths(tmp_path):
    write(tmp_path / "in.parquet", pa.table({"text": pa.array([None], pa.string())}))
    assert lengths(echo_job(tmp_path)).prompts == ()
