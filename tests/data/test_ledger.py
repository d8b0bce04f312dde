from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.data.commits import Commit
from batchinfer.data.ledger import Ledger
from batchinfer.data.source import Source
from batchinfer.errors import DriftError, ExitCode, IntegrityError, LockedError, OutputError
from tests.echo_jobs import read_output, texts, write

SEMANTIC = {"prompt": {"template": "a"}, "sampling": {"seed": 0, "stop": ("x",)}, "engine": {"weights": "w"}}


@pytest.fixture
def source(tmp_path) -> Source:
    write(tmp_path / "in" / "day=1" / "a.parquet", texts(10))
    write(tmp_path / "in" / "day=2" / "b.parquet", texts(5))
    return Source([str(tmp_path / "in")])


def begun(tmp_path, source) -> Ledger:
    ledger = Ledger(tmp_path / "out")
    ledger.__enter__()
    ledger.begin(source, 4, SEMANTIC, {"model": "m"})
    return ledger


def finish(ledger: Ledger, unit, part: bytes | None = None) -> Commit:
    """Stage and describe a unit as the sink does."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"unit": [unit.index] * unit.rows}), buffer)
    part = part or buffer.getvalue().to_pybytes()
    ledger.stage(unit, part)
    return Commit(
        unit=unit.index, part=ledger.part_name(unit), rows=unit.rows, bytes=len(part),
        sha256=hashlib.sha256(part).hexdigest(), file=unit.file, first_row=unit.first_row, failed=0,
        finish_reasons={"stop": unit.rows}, prompt_tokens=0, completion_tokens=0, fingerprint=ledger.fingerprint,
        epoch=ledger.epoch,
    )  # fmt: skip


def test_a_plan_is_frozen_and_parts_mirror_the_input_s_folders(tmp_path, source):
    with contextlib.closing(begun(tmp_path, source)) as ledger:
        assert [(u.file, u.first_row, u.rows) for u in ledger.pending()] == [
            ("day=1/a.parquet", 0, 4), ("day=1/a.parquet", 4, 4), ("day=1/a.parquet", 8, 2),
            ("day=2/b.parquet", 0, 4), ("day=2/b.parquet", 4, 1),
        ]  # fmt: skip
        ledger.commit([finish(ledger, ledger.units[1]), finish(ledger, ledger.units[3])])
    with contextlib.closing(begun(tmp_path, source)) as again:
        assert again.epoch == 2 and [u.index for u in again.pending()] == [0, 2, 4] and not again.complete
        again.commit([finish(again, unit) for unit in again.pending()])
        assert again.complete and again.verify() == 15
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.parquet")}
    assert names == {
        "day=1/part-000000-2.parquet", "day=1/part-000001-1.parquet", "day=1/part-000002-2.parquet",
        "day=2/part-000003-1.parquet", "day=2/part-000004-2.parquet",
    }  # fmt: skip


def test_a_second_run_is_refused_and_told_who_holds_the_output(tmp_path, source):
    with contextlib.closing(begun(tmp_path, source)):
        with pytest.raises(LockedError, match=rf"process {os.getpid()} on .* since 20\d\d-") as refused:
            Ledger(tmp_path / "out").__enter__()
        assert refused.value.exit_code == ExitCode.LOCKED
    with contextlib.closing(begun(tmp_path, source)):
        pass


def test_what_never_began_leaves_no_trace(tmp_path):
    with pytest.raises(RuntimeError), Ledger(tmp_path / "out"):
        raise RuntimeError("the model is missing")
    assert os.listdir(tmp_path) == []


def test_a_folder_with_other_files_is_not_written_into(tmp_path, source):
    write(tmp_path / "out" / "mine.parquet", texts(1))
    with Ledger(tmp_path / "out") as ledger, pytest.raises(OutputError, match="not empty .*mine.parquet"):
        ledger.begin(source, 4, SEMANTIC, {})


def test_another_job_is_refused_with_the_difference(tmp_path, source):
    begun(tmp_path, source).close()
    changed = json.loads(json.dumps(SEMANTIC))
    changed["prompt"]["template"] = "b"
    changed["engine"]["weights"] = "v"
    with Ledger(tmp_path / "out") as ledger, pytest.raises(DriftError) as drift:
        ledger.begin(source, 4, changed, {})
    assert "prompt.template: 'a' -> 'b'" in str(drift.value) and "engine.weights: 'w' -> 'v'" in str(drift.value)
    assert drift.value.exit_code == ExitCode.DRIFT


def test_operational_settings_may_change_and_units_stay_as_planned(tmp_path, source):
    begun(tmp_path, source).close()
    with Ledger(tmp_path / "out") as ledger:
        ledger.begin(source, 1000, SEMANTIC, {"model": "elsewhere"})
        assert len(ledger.units) == 5 and ledger.identity["model"] == "elsewhere"


def mutate(how: str, folder: Path) -> None:
    file = folder / "day=1" / "a.parquet"
    if how == "changed":
        write(file, texts(11))
    elif how == "touched":
        os.utime(file, ns=(1, 1))
    elif how == "same size and time":
        stat = file.stat()
        data = bytearray(file.read_bytes())
        data[-12] ^= 1  # in the footer
        file.write_bytes(data)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "gone":
        file.unlink()
    else:
        write(folder / "day=3" / "c.parquet", texts(1))


@pytest.mark.parametrize(
    "how, said",
    [
        ("changed", "day=1/a.parquet was changed"),
        ("touched", "mtime_ns was"),
        ("gone", "day=1/a.parquet .* is gone"),
        ("added", "day=3/c.parquet was added"),
    ],
)
def test_changed_input_is_refused_by_name(tmp_path, source, how, said):
    begun(tmp_path, source).close()
    mutate(how, tmp_path / "in")
    with Ledger(tmp_path / "out") as ledger, pytest.raises(DriftError, match=said):
        ledger.check_input(Source([str(tmp_path / "in")]))


def test_a_run_killed_between_commit_and_move_is_finished_by_the_next(tmp_path, source, monkeypatch):
    ledger = begun(tmp_path, source)
    monkeypatch.setattr(ledger, "_publish", lambda commit: None)
    ledger.commit([finish(ledger, ledger.units[0])])
    assert not list((tmp_path / "out").rglob("*.parquet"))
    ledger.close()
    with Ledger(tmp_path / "out") as again:
        assert [u.index for u in again.pending()] == [1, 2, 3, 4]
    assert read_output(tmp_path).num_rows == 4


def test_a_run_killed_before_the_commit_leaves_nothing_to_see_and_is_cleared(tmp_path, source):
    ledger = begun(tmp_path, source)
    finish(ledger, ledger.units[0])
    ledger.store.write("commits/000001.json.999999.tmp", b'{"unit": 1')
    ledger.store.write("wal/.DS_Store", b"not ours")
    ledger.store.write("staged/other", b"not ours")
    ledger.close()
    with Ledger(tmp_path / "out") as again:
        assert len(again.pending()) == 5
        assert again.store.list("staged") == again.store.list("commits") == []
    assert read_output(tmp_path).num_rows == 0


def test_with_the_lock_bypassed_two_runs_still_show_every_row_once(tmp_path, source, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    first = begun(tmp_path, source)
    early = [finish(first, unit) for unit in first.units[:3]]
    second = begun(tmp_path, source)
    first_again = [finish(first, unit) for unit in first.units[:3]]  # same process: its lease does not look alive
    assert early[0].part != second.part_name(second.units[0])
    second.commit([finish(second, unit) for unit in second.units[1:]])
    first.commit(first_again)
    first.close()
    second.close()
    assert {c.epoch for c in first.commits.values()} == {1, 2}
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.complete and ledger.verify() == 15
    assert read_output(tmp_path)["unit"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4 + [4]


@pytest.mark.parametrize("size", ["missing", "cut"])
def test_a_committed_part_that_is_gone_or_cut_is_an_integrity_error(tmp_path, source, size):
    ledger = begun(tmp_path, source)
    commit = finish(ledger, ledger.units[0])
    ledger.commit([commit])
    ledger.close()
    part = tmp_path / "out" / commit.part
    part.unlink() if size == "missing" else part.write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="part-000000-1.parquet (is missing|has 4 bytes)") as damage:
        Ledger(tmp_path / "out").__enter__()
    assert damage.value.exit_code == ExitCode.INTEGRITY


def test_verify_finds_a_flipped_byte_and_names_every_damaged_part(tmp_path, source):
    with contextlib.closing(begun(tmp_path, source)) as ledger:
        commits = [finish(ledger, unit) for unit in ledger.units]
        ledger.commit(commits)
        for commit in commits[:2]:
            path = tmp_path / "out" / commit.part
            data = bytearray(path.read_bytes())
            data[20] ^= 1
            path.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"(?s)part-000000.*sha256 differs.*part-000001.*sha256 differs"):
            ledger.verify()


def test_a_damaged_commit_record_or_plan_is_an_integrity_error(tmp_path, source):
    ledger = begun(tmp_path, source)
    ledger.commit([finish(ledger, ledger.units[0])])
    ledger.close()
    record = tmp_path / "out.batchinfer" / "commits" / "000000.json"
    whole = record.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        record.write_bytes(whole[:cut])
        with pytest.raises(IntegrityError, match="000000.json is damaged"):
            Ledger(tmp_path / "out").__enter__()
    record.write_bytes(whole)
    (tmp_path / "out.batchinfer" / "plan-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="is damaged"):
        Ledger(tmp_path / "out").__enter__()
    (tmp_path / "out.batchinfer" / "plan-000.parquet").unlink()
    with pytest.raises(IntegrityError, match="plan-000.parquet is missing"):
        Ledger(tmp_path / "out").__enter__()
