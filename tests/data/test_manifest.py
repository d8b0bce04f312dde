from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchinfer.data.ledger import Ledger
from batchinfer.data.store import LocalStore
from batchinfer.errors import IntegrityError, OutputError
from tests.echo_jobs import echo_job, read_output, run_echo, texts, write


@pytest.fixture
def job(tmp_path):
    for day, rows in ((1, 100), (2, 30)):
        write(tmp_path / "in" / f"day={day}" / "x.parquet", texts(rows))
    return echo_job(tmp_path, tmp_path / "in", model__path="models/tiny.gguf", job__name="nightly")


def control(tmp_path) -> Path:
    return tmp_path / "out.batchinfer"


def manifest(tmp_path) -> dict:
    return json.loads((control(tmp_path) / "manifest.json").read_bytes())


def verify(tmp_path) -> int:
    with Ledger(tmp_path / "out") as ledger:
        return ledger.verify()


def test_a_complete_output_has_a_manifest_of_every_part_sealed_by_success(tmp_path, job):
    summary = run_echo(job)
    told = manifest(tmp_path)
    assert (told["job"], told["rows"], told["failed"], told["finish_reasons"]) == ("nightly", 130, 0, {"stop": 130})
    assert told["completion_tokens"] == summary.job.completion_tokens
    assert told["engine"]["engine"] == "echo" and told["fingerprint"]
    sources = [source for part in told["parts"] for source in part["sources"]]
    assert [(source["file"], source["first_row"], source["end_row"]) for source in sources] == [
        ("day=1/x.parquet", 0, 64), ("day=1/x.parquet", 64, 100), ("day=2/x.parquet", 0, 30),
    ]  # fmt: skip
    for part in told["parts"]:
        data = (tmp_path / "out" / part["part"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (part["bytes"], part["sha256"])
    schema = pq.read_schema(tmp_path / "out" / told["parts"][0]["part"])
    assert told["schema"] == [{"name": f.name, "type": str(f.type)} for f in schema]
    assert verify(tmp_path) == 130 == read_output(tmp_path).num_rows
    assert subprocess.run(["sha256sum", "-c", "_SUCCESS"], cwd=control(tmp_path), capture_output=True).returncode == 0


def test_footers_of_parts_name_job_model_and_unit(tmp_path, job):
    run_echo(job)
    part = manifest(tmp_path)["parts"][1]
    footer = pq.read_schema(tmp_path / "out" / part["part"]).metadata
    assert {key.decode(): value.decode() for key, value in footer.items()} == {
        "batchinfer.job": "nightly",
        "batchinfer.model": "tiny",
        "batchinfer.fingerprint": manifest(tmp_path)["fingerprint"],
        "batchinfer.unit": "1",
    }


def test_success_stands_only_while_the_output_is_complete(tmp_path, job, monkeypatch):
    failing = LocalStore.put_if_absent

    def full(store, name, data):
        if name.startswith("commits/000002"):
            raise OutputError("the disk is full")
        return failing(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put_if_absent", full)
        with pytest.raises(OutputError):
            run_echo(job)
    assert not (control(tmp_path) / "_SUCCESS").exists() and not (control(tmp_path) / "manifest.json").exists()
    run_echo(job)
    assert verify(tmp_path) == 130 and (control(tmp_path) / "_SUCCESS").exists()
    with Ledger(tmp_path / "out") as ledger:  # the output goes on, for whatever reason
        ledger.begin(None, 64, ledger.identity["semantic"], {})
        assert not (control(tmp_path) / "_SUCCESS").exists() and not (control(tmp_path) / "manifest.json").exists()


def test_a_run_killed_before_the_manifest_leaves_it_to_the_next_which_needs_no_model(tmp_path, job):
    run_echo(job)
    before = (control(tmp_path) / "manifest.json").read_bytes()
    for names in (["_SUCCESS"], ["_SUCCESS", "manifest.json"]):
        for name in names:
            (control(tmp_path) / name).unlink()
        assert verify(tmp_path) == 130  # nothing is promised, nothing is broken
        run_echo(job, backend=lambda folder: pytest.fail("the model was opened"))
        assert (control(tmp_path) / "manifest.json").read_bytes() == before and verify(tmp_path) == 130


@pytest.mark.parametrize("how", ["gone", "flipped", "another part", "another total", "not complete"])
def test_verify_finds_a_manifest_that_is_not_the_output_s(tmp_path, job, how):
    run_echo(job)
    path, said = control(tmp_path) / "manifest.json", "is not the one that _SUCCESS was written for"
    told = manifest(tmp_path)
    if how == "gone":
        path.unlink()
        said = "manifest.json: is missing"
    elif how == "flipped":
        path.write_bytes(path.read_bytes().replace(b"nightly", b"nightlY"))
    elif how == "not complete":
        (control(tmp_path) / "commits" / "000002.json").unlink()
        said = "_SUCCESS: stands, and 1 units are not committed"
    else:
        if how == "another part":
            told["parts"][1]["rows"] += 1
            said = "manifest.json: the part of unit 1 is not what was committed"
        else:
            told["rows"] += 1
            said = "manifest.json: rows is not what was committed"
        path.write_text(json.dumps(told, indent=1))
        seal = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  manifest.json\n"
        (control(tmp_path) / "_SUCCESS").write_text(seal)
    with pytest.raises(IntegrityError, match=said):
        verify(tmp_path)
