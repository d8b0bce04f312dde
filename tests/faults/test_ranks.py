"""Ranks of a pipeline are killed while a job runs: the run goes on with new ones, and each row comes out once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.backends.test_process import gone
from tests.echo_jobs import read_output
from tests.faults.test_engine import ROWS, engines, finish, make_input, model, start

__all__ = ["model"]
pytestmark = [pytest.mark.e2e, pytest.mark.slow]
LAYOUTS = {
    "pipeline": ("engine.pp=2",),
    "apart": ("engine.mode=disaggregated",),
}


def ranks(folder: Path) -> list[int]:
    """Process ids of the newest engine's ranks, those that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == engines(folder)[-1] and b"engine.worker" in stat.with_name("cmdline").read_bytes():
                found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_run_outlives_the_death_of_any_rank(model, tmp_path, layout):
    make_input(tmp_path)
    run = start(model, tmp_path, "plain", "sampling.max_tokens=150", *LAYOUTS[layout])
    every = []
    for victim in (0, 1):
        until = time.monotonic() + 60
        while len(alive := ranks(tmp_path)) < 2 or alive[0] in every:
            assert time.monotonic() < until and run.poll() is None
            time.sleep(0.05)
        every += alive
        time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(alive[victim], signal.SIGKILL)
    code, told = finish(run)
    assert code == 0, told
    out = read_output(tmp_path)
    assert out["id"].to_pylist() == list(range(ROWS)) and out["error"].null_count == ROWS
    assert len(engines(tmp_path)) == 3
    assert all(gone(pid) for pid in every + engines(tmp_path))
