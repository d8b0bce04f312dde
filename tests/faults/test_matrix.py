"""The fault matrix in short, as ``python -m tests.faults.matrix`` runs it at length."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_whatever_fails_every_row_is_there_once_and_no_reader_sees_anything_half_written(tmp_path):
    command = [sys.executable, "-m", "tests.faults.matrix", "--short", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    faults, rows = re.search(r"([\d,]+) faults, ([\d,]+) rows checked, 0 lost, 0 doubled", done.stdout).groups()
    assert int(faults.replace(",", "")) > 80 and int(rows.replace(",", "")) > 4000
    assert "saw 0 times what must not be" in done.stdout
