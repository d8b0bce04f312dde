"""A few of the files that ``python -m tests.faults.fuzz`` makes, and what a checksum is good for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchinfer.data.source import Source
from batchinfer.errors import InputError
from tests.echo_jobs import texts, write

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_no_file_makes_a_run_end_otherwise_than_in_all_rows_or_one_clear_line():
    command = [sys.executable, "-m", "tests.faults.fuzz", "--files", "84"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "84 files, 0 ended otherwise" in done.stdout


def test_a_flipped_bit_of_a_page_that_has_a_checksum_is_found(tmp_path):
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write(tmp_path / "in.parquet", texts(100), **options)
    data = bytearray(path.read_bytes())
    data[data.index(b"row number 50")] ^= 1
    path.write_bytes(data)
    source = Source([str(path)])
    with pytest.raises(InputError, match="in.parquet cannot be read as Parquet.*CRC"):
        list(source.read(source.units(100), ["text"]))


def test_a_footer_that_contradicts_itself_is_damage(tmp_path, monkeypatch):
    """Flipped bits can leave as many rows as the row groups have, and another number for the file."""

    class Flipped:
        def __init__(self, metadata):
            self._metadata, self.num_rows = metadata, metadata.num_rows + 16

        def __getattr__(self, name):
            return getattr(self._metadata, name)

    plain = pq.read_metadata
    monkeypatch.setattr("batchinfer.data.files.pq.read_metadata", lambda file: Flipped(plain(file)))
    write(tmp_path / "in.parquet", texts(10))
    with pytest.raises(InputError, match=r"in.parquet is damaged: its footer says 26 rows, and 10 in its row groups"):
        Source([str(tmp_path / "in.parquet")])
