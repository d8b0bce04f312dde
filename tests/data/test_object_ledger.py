"""A ledger in an object store: runs that were thought dead and go on do no harm."""

from __future__ import annotations

import json
import time

import pytest

from batchinfer.data import lease
from batchinfer.data.ledger import Ledger
from batchinfer.data.source import Source
from batchinfer.errors import LockedError
from tests.data.test_ledger import SEMANTIC, finish
from tests.echo_jobs import texts


@pytest.fixture
def begin(bucket):
    """Begins a run, to which those before it seem dead."""
    for day in (1, 2):
        bucket.put(f"in/day={day}/x.parquet", texts(8))
    source = Source([f"{bucket.url}/in"])
    begun: list[Ledger] = []

    def begin() -> Ledger:
        if begun:
            bucket.delete("out.batchinfer/lock")
        ledger = Ledger(f"{bucket.url}/out")
        begun.append(ledger.__enter__())
        ledger.begin(source, 4, SEMANTIC, {})
        return ledger

    yield begin
    for ledger in begun:
        ledger.close()


def elsewhere(bucket, epoch: int) -> None:
    """Have a lease look as if its run was on another machine."""
    name = f"out.batchinfer/leases/{epoch:06d}.json"
    bucket.put(name, json.dumps({**json.loads(bucket.get(name)), "host": "elsewhere"}).encode())


def test_what_a_run_on_another_machine_has_staged_is_kept_for_as_long_as_it_may_commit_it(bucket, begin):
    first = begin()
    elsewhere(bucket, 1)
    early, late = (finish(first, first.units[i]) for i in (0, 1))
    second = begin()
    second.commit([finish(second, second.units[1])])
    first.commit([early, late])  # it was frozen, and did not hear of the second yet
    assert first.commits[1].epoch == 2 and first.commits[0].epoch == 1
    third = begin()
    assert [unit.index for unit in third.pending()] == [2, 3]
    third.commit([finish(third, unit) for unit in third.pending()])
    assert third.complete and third.verify() == 16
    assert bucket.read()["unit"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_what_it_can_never_commit_is_cleared(bucket, begin):
    first = begin()
    elsewhere(bucket, 1)
    for i in (0, 1):
        finish(first, first.units[i])
    second = begin()
    second.commit([finish(second, second.units[1])])
    begin()
    assert bucket.names("out.batchinfer/staged") == ["out.batchinfer/staged/000000.1"]


def test_a_move_that_another_run_finished_is_no_failure(bucket, begin, monkeypatch):
    first = begin()
    elsewhere(bucket, 1)
    commit = finish(first, first.units[0])
    plain = first._publish
    monkeypatch.setattr(first, "_publish", lambda commit: (begin(), plain(commit)))
    first.commit([commit])
    assert bucket.names("out") == [f"out/{commit.part}"]


@pytest.mark.parametrize("beat", [0.05, 1000.0])
def test_a_run_that_lost_its_lease_is_refused_at_its_next_commit_and_leaves_the_lock_alone(
    bucket, begin, monkeypatch, beat
):
    monkeypatch.setattr(lease, "BEAT", beat)
    first = begin()
    commit = finish(first, first.units[0])
    second = begin()
    if beat > 1:
        monkeypatch.setattr(lease, "STALE", 0.0)  # it was frozen, and goes on before it could renew
    else:
        time.sleep(0.5)
    with pytest.raises(LockedError, match="taken over by another run|is gone"):
        first.commit([commit])
    assert bucket.names("out") == []
    first.close()
    second._lock.check()
    assert "out.batchinfer/lock" in bucket.names("out.batchinfer")
