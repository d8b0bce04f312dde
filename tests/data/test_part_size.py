"""Parts of about the size that a job asks for, however its input is cut into files."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from batchinfer.backends.echo import EchoBackend
from batchinfer.errors import JobError
from batchinfer.request import Completion, Output
from batchinfer.size import in_bytes
from tests.echo_jobs import echo_job, read_output, run_echo, write


class Talking(EchoBackend):
    """Says ``max_tokens`` words that do not compress well."""

    def generate(self, requests):
        for request in filter(None, requests):
            words, n = random.Random(request.sampling.seed), request.sampling.max_tokens
            text = " ".join(f"{words.randrange(900):03}" for _ in range(n))
            yield Completion(request.key, (Output(text, [1] * n, "length"),), 3)


def noise(rows: int, first: int = 0) -> pa.Table:
    chance = random.Random(first)
    texts = [chance.randbytes(100).hex() for _ in range(rows)]
    return pa.table({"id": range(first, first + rows), "text": texts, "more": texts})


@pytest.mark.parametrize("files", [1, 40])
def test_parts_have_about_the_size_asked_for(tmp_path, files):
    rows = 4000 // files
    for index in range(files):
        write(tmp_path / "in" / f"{index:02}.parquet", noise(rows, index * rows), compression="zstd")
    job = echo_job(tmp_path, tmp_path / "in", output__part_size="100 kB", sampling__max_tokens=32)
    run_echo(job, Talking)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert 6 <= len(sizes) <= 16 and all(60_000 < size < 130_000 for size in sizes[1:])
    assert read_output(tmp_path)["id"].to_pylist() == list(range(4000))


def test_columns_that_are_not_carried_do_not_count(tmp_path):
    write(tmp_path / "in.parquet", noise(4000), compression="zstd")
    parts = {}
    for columns in (["id"], ["id", "text", "more"]):
        out = {"output__path": str(tmp_path / columns[-1]), "output__columns": columns}
        run_echo(echo_job(tmp_path, output__part_size="50kB", sampling__max_tokens=4, **out))
        parts[columns[-1]] = len(list((tmp_path / columns[-1]).iterdir()))
    assert parts["id"] <= 3 and parts["more"] >= 8


def test_files_added_later_are_cut_the_same_way(tmp_path):
    changes = {"output__part_size": "100kB", "input__on_change": "append", "sampling__max_tokens": 4}
    write(tmp_path / "in" / "0.parquet", noise(1000), compression="zstd")
    run_echo(echo_job(tmp_path, tmp_path / "in", **changes))
    for index in range(10, 20):
        write(tmp_path / "in" / f"{index}.parquet", noise(10, index * 100), compression="zstd")
    run_echo(echo_job(tmp_path, tmp_path / "in", **changes))
    assert len([path for path in (tmp_path / "out").iterdir() if "-2." in path.name]) == 1


@pytest.mark.parametrize("size, wanted", [("128MB", 128e6), ("64 MiB", 2**26), ("1.5k", 1500), ("7", 7), ("2gb", 2e9)])
def test_sizes_are_written_as_people_write_them(size, wanted):
    assert in_bytes(size) == wanted


@pytest.mark.parametrize("size", ["", "0", "big", "12XB", "-3MB"])
def test_what_is_no_size_is_refused(tmp_path, size):
    with pytest.raises(JobError, match='output.part_size: must be a size above zero such as "128MB"'):
        echo_job(tmp_path, output__part_size=size)
