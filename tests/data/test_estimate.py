from __future__ import annotations

import json
import time
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest

from batchinfer.data import draw
from batchinfer.data.draw import draw_rows
from batchinfer.data.estimate import estimate, save
from batchinfer.data.source import Source, Unit
from batchinfer.errors import InputError
from tests.echo_jobs import echo_job, run_echo, texts, tokenizer_dir, write


@pytest.fixture(autouse=True)
def bytes_for_tokens(monkeypatch):
    """Every model's tokenizer is the one whose tokens are bytes."""
    monkeypatch.setattr("batchinfer.engine.model.tokenizer.export_tokenizer", lambda model: tokenizer_dir())


def rows_of(tmp_path, name: str, count: int, group: int) -> None:
    write(tmp_path / "in" / f"{name}.parquet", texts(count), row_group_size=group)


def drawn(tmp_path, count: int, seed: int = 0, **asked) -> list[Unit]:
    return draw_rows(Source.of(echo_job(tmp_path, source=tmp_path / "in", **asked)), count, seed)[0]


# ---- the sample


def test_rows_are_drawn_from_every_stretch_of_every_file(tmp_path):
    for name, count in {"a": 1000, "b": 0, "c": 1000}.items():
        rows_of(tmp_path, name, count, 500)
    units = drawn(tmp_path, 200, seed=1)
    assert len({(unit.file, unit.first_row) for unit in units}) == len(units) == 200
    for name in "ac":
        rows = [unit.first_row for unit in units if unit.file == f"{name}.parquet"]
        assert rows == sorted(rows) and max(np.diff(rows)) < 20 and len(rows) == 100
    assert all(unit.pieces[0].row_groups == (unit.first_row // 500,) * 2 for unit in units)
    assert units == drawn(tmp_path, 200, seed=1) != drawn(tmp_path, 200, seed=2)


def test_a_small_input_is_drawn_whole_and_an_empty_one_not_at_all(tmp_path):
    rows_of(tmp_path, "a", 3, 2)
    assert [(u.first_row, *u.pieces[0].row_groups) for u in drawn(tmp_path, 10)] == [(0, 0, 0), (1, 0, 0), (2, 1, 1)]
    rows_of(tmp_path, "a", 0, 2)
    assert drawn(tmp_path, 10) == []


def test_a_huge_input_is_not_decoded_whole(tmp_path):
    rows_of(tmp_path, "a", 10_000, 100)
    with mock.patch.object(draw, "MOST_DECODED", 1000):
        units = drawn(tmp_path, 500)
    groups = {unit.pieces[0].row_groups[0] for unit in units}
    assert 450 < len(units) < 550 and len(groups) == 10 and max(groups) - min(groups) > 80


def test_only_rows_that_the_job_is_about_are_drawn(tmp_path):
    rows_of(tmp_path, "a", 1000, 100)
    units = drawn(tmp_path, 50, input__filter="id % 3 = 0", input__limit=200)
    assert len(units) == 50 and all(unit.first_row % 3 == 0 and unit.first_row < 600 for unit in units)
    found = estimate(echo_job(tmp_path, source=tmp_path / "in", input__filter="id % 3 = 0", input__limit=200))
    assert (found.rows, found.sampled) == (200, 200)


# ---- what it foretells


def test_a_whole_input_is_foretold_exactly(tmp_path):
    write(tmp_path / "in.parquet", texts(300))
    job = echo_job(tmp_path, sampling__max_tokens=4, sampling__ignore_eos=True)
    found = estimate(job, sample=1000)
    tokens = sum(len(f"Say row number {i}") for i in range(300))
    assert (found.rows, found.sampled, found.tokens_in, found.tokens_out) == (300, 300, (tokens, tokens), (1200, 1200))
    assert found.seconds is None and "--tok-s" in str(found) and "every sampled row can be asked" in str(found)
    assert not (tmp_path / "out.batchinfer").exists()


def test_a_sample_brackets_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4, 1, 6000).astype(int)
    for i in range(3):
        rows = pa.table({"text": ["x" * n for n in lengths[i * 2000 : (i + 1) * 2000]]})
        write(tmp_path / "in" / f"{i}.parquet", rows, row_group_size=500)
    found = estimate(echo_job(tmp_path, source=tmp_path / "in", sampling__max_tokens=16), sample=500)
    low, high = found.tokens_in
    assert found.sampled == 500 and low < lengths.sum() + 4 * 6000 < high < 1.3 * low
    assert found.tokens_out == (6000, found.tokens_out[1]) and found.tokens_out[1] <= 16 * 6000


def test_a_rate_makes_a_time_and_the_next_run_foretells_itself(tmp_path):
    write(tmp_path / "in.parquet", texts(300))
    job = echo_job(tmp_path)
    low, high = estimate(job, tok_s=1000.0).seconds
    assert low < 2 * 5290 / 1000 < high
    run_echo(job)
    found = estimate(job)
    assert found.rate and found.seconds and "finished so far" in found.tokens_out_from
    assert found.tokens_out == (5290, 5290)
    other = echo_job(tmp_path, sampling__max_tokens=3)
    assert estimate(other).rate is None, "another job's rate is not this one's"


@pytest.mark.parametrize("how, asked", [("error", 0), ("skip", 0), ("truncate_left", 1)])
def test_overlong_rows_are_told_by_address(tmp_path, how, asked):
    write(tmp_path / "in.parquet", pa.table({"text": ["short", "y" * 500, "short"]}))
    with mock.patch("batchinfer.data.estimate.longest_sequence", lambda job: 100):
        found = estimate(echo_job(tmp_path, prompt__on_overlong=how, sampling__max_tokens=40))
    assert found.overlong == {"in.parquet:1": 504} and found.overlong_rows == (1, 1)
    assert found.tokens_in[0] == 18 + asked * 75 and found.tokens_out[1] == 80 + asked * 25
    assert "in.parquet:1: 504 tokens" in str(found)


def test_failures_are_told_by_kind_and_never_by_text(tmp_path):
    write(tmp_path / "in.parquet", pa.table({"text": ["ok", None, "  ", None], "n": [1, 1, 1, 1]}))
    found = estimate(echo_job(tmp_path, prompt__template="{{ text }}"))
    assert sum(found.failures.values()) == 3 and found.examples[found.failures.most_common(1)[0][0]] == "in.parquet:1"
    told = json.loads(json.dumps(found.as_dict()))
    assert told["sampled"] == 4 and sum(told["failures"].values()) == 3 and told["prompt_tokens"]["max"] == 2


def test_an_empty_input_costs_nothing(tmp_path):
    write(tmp_path / "in.parquet", texts(0))
    found = estimate(echo_job(tmp_path), tok_s=5.0)
    assert (found.rows, found.tokens_in, found.tokens_out) == (0, (0, 0), (0, 0)) and "0 rows" in str(found)


def test_a_job_that_cannot_run_is_told_so(tmp_path):
    write(tmp_path / "in.parquet", texts(3))
    with pytest.raises(InputError, match="'txt'"):
        estimate(echo_job(tmp_path, prompt__template="{{ txt }}"))


def test_a_kept_estimate_is_no_hindrance_to_the_run(tmp_path):
    write(tmp_path / "in.parquet", texts(10))
    job = echo_job(tmp_path)
    kept = save(estimate(job, tok_s=10.0), job.output.path)
    assert json.loads(kept.read_bytes())["rows"] == 10 and time.time() - json.loads(kept.read_bytes())["time"] < 60
    assert run_echo(job).state == "complete" and kept.exists()
