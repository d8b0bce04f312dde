"""The store's promises on an object store, also while its requests fail."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from batchinfer.data import bucket as module
from batchinfer.data import lease
from batchinfer.data.object_store import ObjectStore
from batchinfer.data.store import open_store
from batchinfer.errors import ExitCode, JobError, LockedError, OutputError, StoreError
from tests.s3 import FAULTS, at_random


@pytest.fixture
def store(bucket) -> ObjectStore:
    return open_store(f"{bucket.url}/some/folder/")


def first(fault: str, method: str, *, times: int = 1):
    """A fault for the first requests of a kind."""
    left = [times]

    def decide(asked: str, path: str) -> str | None:
        if asked != method or left[0] <= 0:
            return None
        left[0] -= 1
        return fault

    return decide


def test_what_was_written_is_read_listed_and_measured(bucket, store):
    store.write("staged/a b=ü#%20", b"abc")
    store.replace("job.json", b"{}")
    store.replace("job.json", b"{1}")
    assert store.read("job.json") == b"{1}" and store.size("job.json") == 3 and store.size("none") is None
    assert store.list(".") == ["job.json"] and store.list("staged") == ["a b=ü#%20"] and store.list("none") == []
    assert store.walk() == {"job.json": 3, "staged/a b=ü#%20": 3}
    assert list(store.read_all(["job.json", "staged/a b=ü#%20"])) == [b"{1}", b"abc"]
    assert (
        store.path("job.json") == f"{bucket.url}/some/folder/job.json"
        and str(store.root) == f"{bucket.url}/some/folder"
    )
    with store.open("job.json") as file:
        assert (file.seek(1), file.read(1), file.tell(), file.read()) == (1, b"1", 2, b"}")
    with pytest.raises(FileNotFoundError):
        store.read("none")
    store.remove(["job.json", "none"])
    assert bucket.names() == ["some/folder/staged/a b=ü#%20"]


def test_appended_pieces_are_one_file(bucket, store):
    for piece in (b"a", b"bc", b"d"):
        store.append("wal/000001.1.arrows", piece)
    again = open_store(store.root)  # a later process
    again.append("wal/000001.1.arrows", b"e")
    assert again.read("wal/000001.1.arrows") == b"abcde" and again.size("wal/000001.1.arrows") == 5
    assert again.list("wal", ".arrows") == ["000001.1.arrows"]
    again.remove(["wal/000001.1.arrows"])
    assert bucket.names() == [] and again.list("wal") == []


def test_moving_gives_a_part_its_name_and_leaves_nothing(bucket, store):
    out = open_store(f"{bucket.url}/out")
    store.write("staged/1", b"part")
    store.move("staged/1", out, "day=1/part.parquet")
    assert bucket.names() == ["out/day=1/part.parquet"] and out.read("day=1/part.parquet") == b"part"
    with pytest.raises(OutputError, match="staged/1: it is gone"):
        store.move("staged/1", out, "day=1/part.parquet")


def test_of_many_writers_of_one_name_exactly_one_wins(store):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.put_if_absent("commits/1.json", str(i).encode()), range(24)))
    assert sum(won) == 1 and store.read("commits/1.json") == str(won.index(True)).encode()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_put_if_absent_that_met_a_fault_knows_whether_it_won(bucket, store, fault):
    bucket.proxy.fault = first(fault, "PUT")
    assert store.put_if_absent("a", b"mine") is True
    assert bucket.proxy.faults == {fault: 1}
    bucket.proxy.fault = first(fault, "PUT")
    assert store.put_if_absent("a", b"mine") is False  # the same bytes, and another's all the same
    assert bucket.get("some/folder/a") == b"mine"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_a_fault_that_passes_is_not_noticed(bucket, store, fault, method):
    bucket.put("some/folder/big", bytes(range(256)) * 1000)
    bucket.proxy.fault = first(fault, method, times=2)
    store.write("x", b"1")
    store.move("x", store, "y")
    assert store.read("y") == b"1" and store.read("big") == bytes(range(256)) * 1000
    with store.open("big") as file:
        assert file.read(5) == bytes(range(5))
    assert store.size("big") == 256_000 and store.walk() == {"big": 256_000, "y": 1}
    assert bucket.proxy.faults == {fault: 2}


def test_a_fault_that_stays_is_one_line_and_exit_75(bucket, store, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    for fault in ("500", "503", "reset", "lost"):
        bucket.proxy.fault = lambda method, path, fault=fault: fault
        with pytest.raises(StoreError) as raised:
            store.put_if_absent("a", b"1")
        assert raised.value.exit_code == ExitCode.STOPPED
        said = str(raised.value)
        assert said.startswith(f"cannot write {bucket.url}/some/folder/a: ") and "run the same command again" in said
        assert "\n" not in said and "127.0.0.1" not in said
        assert {"500": "status 500 InternalError", "503": "status 503 SlowDown"}.get(fault, "") in said
    asked = bucket.proxy.requests.total()
    store.remove(["a"])  # what may fail does not wait once more
    assert bucket.proxy.requests.total() == asked
    bucket.proxy.fault = lambda method, path: None
    assert store.size("a") in (None, 1)


def test_refused_access_is_one_line_that_names_the_variables_and_no_secret(bucket, store):
    bucket.proxy.fault = lambda method, path: "403"
    with pytest.raises(
        JobError, match=r"access denied \(status 403 AccessDenied\); look at AWS_ACCESS_KEY_ID"
    ) as raised:
        store.list(".")
    assert raised.value.exit_code == ExitCode.USAGE and "secret" not in str(raised.value)
    assert bucket.proxy.requests.total() == 1


def test_a_wrong_bucket_is_told_by_name(bucket):
    missing = open_store("s3://no-such-bucket/out")
    for act in (lambda: missing.write("a", b""), lambda: missing.list("."), lambda: missing.walk()):
        with pytest.raises(JobError, match="there is no bucket s3://no-such-bucket") as raised:
            act()
        assert raised.value.exit_code == ExitCode.USAGE


# ---- leases


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "STALE", 2.5)  # the store's clock counts in seconds
    monkeypatch.setattr(module, "PATIENCE", 0.3)


def test_a_second_holder_is_refused_and_told_who_has_it_for_as_long_as_it_is_held(store, quick):
    held = store.lock("lock", "OUT")
    threading.Event().wait(3.6)  # longer than it lasts without renewal
    with pytest.raises(LockedError, match=r"OUT is being written by another run: process \d+ on .* since 20") as raised:
        store.lock("lock", "OUT")
    assert raised.value.exit_code == ExitCode.LOCKED and store.is_locked("lock")
    held.check()
    held.release()
    assert not store.is_locked("lock") and store.list(".") == []
    store.lock("lock", "OUT").release()


def elsewhere(store: ObjectStore) -> None:
    """Have the lock look as if a run on another machine held it."""
    told = json.loads(store.read("lock"))
    store.replace("lock", json.dumps({**told, "host": "elsewhere", "run": "another"}).encode())


def test_a_lease_that_is_not_renewed_is_taken_over_and_its_holder_told(store, quick, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 1000.0)
    first = store.lock("lock", "OUT")
    elsewhere(store)
    with pytest.raises(LockedError, match=r"on elsewhere, .*its lease ends in \d s"):
        store.lock("lock", "OUT")
    threading.Event().wait(3.6)
    monkeypatch.setattr(lease, "BEAT", 0.1)
    second = store.lock("lock", "OUT")
    second.check()
    assert store.list(".") == ["lock"]
    second.release()
    first._ended.set()


def test_a_holder_that_was_overtaken_stops_at_its_next_commit_and_leaves_the_lock_alone(store, quick):
    held = store.lock("lock", "OUT")
    elsewhere(store)
    threading.Event().wait(0.5)
    with pytest.raises(LockedError, match="taken over by another run: process .* on elsewhere"):
        held.check()
    held.release()
    assert store.list(".") == ["lock"]


def test_renewals_whose_answers_are_lost_keep_the_lease(bucket, store, quick):
    held = store.lock("lock", "OUT")
    bucket.proxy.fault = at_random(1, 0.5)
    threading.Event().wait(1.0)
    bucket.proxy.fault = lambda method, path: "lost"  # none gets through, for longer than is retried
    threading.Event().wait(0.7)
    bucket.proxy.fault = lambda method, path: None
    threading.Event().wait(0.7)
    held.check()
    held.release()


def test_of_many_that_find_it_stale_one_takes_it(store, quick):
    store.replace("lock", json.dumps({"pid": 1, "host": "elsewhere", "since": "then"}).encode())
    threading.Event().wait(3.6)
    with ThreadPoolExecutor(6) as pool:
        tries = [pool.submit(open_store(store.root).lock, "lock", "OUT") for _ in range(6)]
    held = [each.result() for each in tries if each.exception() is None]
    assert len(held) == 1 and all(isinstance(each.exception(), (LockedError, type(None))) for each in tries)
    held[0].release()
