"""How shards are named, and how units are dealt to them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.data.units import Piece, Unit
from batchinfer.errors import JobError
from batchinfer.job import Job
from batchinfer.shard import Shard

NEEDED = {"input": {"path": "i"}, "prompt": {"template": "t"}, "model": {"path": "m"}, "output": {"path": "o"}}


def unit(index: int, file: str, first_row: int) -> Unit:
    return Unit(index, (Piece(file, first_row, 64, (0, 0)),))


@given(st.integers(1, 40), st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_each_unit_is_dealt_to_one_shard_and_no_shard_gets_two_more_than_another(count, files):
    units = [unit(0, f"f{f}.parquet", 64 * i) for f, number in enumerate(files) for i in range(number)]
    shares = [Shard(index, count).deal(units) for index in range(count)]
    dealt = [(unit.file, unit.first_row) for share in shares for unit in share]
    assert sorted(dealt) == [(unit.file, unit.first_row) for unit in units]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share == sorted(share, key=lambda unit: (unit.file, unit.first_row)) for share in shares)


def test_neighbours_are_spread_so_that_no_shard_gets_the_long_end_of_a_file():
    units = [unit(i, "a.parquet", 64 * i) for i in range(100)]
    mine = [unit.index for unit in Shard(0, 2).deal(units)]
    assert mine != list(range(0, 100, 2)) and 15 < sum(index < 50 for index in mine) < 35


@pytest.mark.parametrize(
    "environ, told",
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "8"}, "3/8"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "10",
                "SLURM_ARRAY_TASK_STEP": "3", "SLURM_ARRAY_TASK_COUNT": "4",
            },
            "2/4",
        ),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "2"}, "0/2"),
        ({"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETIONS": "5"}, "4/5"),
    ],
)  # fmt: skip
def test_auto_is_what_the_array_job_says(environ, told):
    assert str(Shard.of("auto", environ)) == told


def test_a_count_may_be_given_where_the_array_job_tells_none():
    assert Shard.of("auto/6", {"JOB_COMPLETION_INDEX": "5"}) == Shard(5, 6)
    with pytest.raises(JobError, match="shard 5 and not of how many: write --shard auto/N, or set JOB_COMPLETIONS"):
        Shard.of("auto", {"JOB_COMPLETION_INDEX": "5"})
    with pytest.raises(JobError, match="no shard 5 of 4: the first is 0/4, the last 3/4"):
        Shard.of("auto/4", {"JOB_COMPLETION_INDEX": "5"})


@pytest.mark.parametrize(
    "environ, said",
    [
        ({}, "none of SLURM_ARRAY_TASK_ID, AWS_BATCH_JOB_ARRAY_INDEX, JOB_COMPLETION_INDEX is set"),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "two"}, "AWS_BATCH_JOB_ARRAY_INDEX must be a whole number, got 'two'"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "7",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            "not evenly spaced",
        ),
    ],
)  # fmt: skip
def test_an_environment_that_does_not_tell_is_refused(environ, said):
    with pytest.raises(JobError, match=said):
        Shard.of("auto", environ)


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/2", "0/0", ""])
def test_what_is_no_shard_is_refused_with_the_job(text):
    with pytest.raises(JobError, match="job.shard.*(written as|counts from 0)"):
        Job.from_dict(NEEDED | {"job": {"shard": text}})


def test_the_shard_is_no_part_of_what_decides_completions():
    assert Job.from_dict(NEEDED | {"job": {"shard": "1/2"}}).semantic() == Job.from_dict(NEEDED).semantic()
