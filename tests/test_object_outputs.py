"""Every command with a job whose input and output lie in an object store."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner, Result

from batchinfer.backends.echo import EchoBackend
from batchinfer.cli import main
from batchinfer.data import bucket as module
from tests.echo_jobs import echo_job, run_echo, texts, tokenizer_dir
from tests.test_runner import stopped

JOB = """
input.path = "{url}/in"
prompt.template = "Say {{{{ text }}}}"
model.path = "echo"
engine = {{ backend = "echo", plan = "plan" }}
output.path = "{url}/out"
checkpoint.unit_rows = 50
"""


@pytest.fixture
def folder(tmp_path, bucket, monkeypatch) -> Path:
    """The working folder: a job file and an engine folder, of which the tokenizer is used."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "tokenizer").symlink_to(tokenizer_dir())
    (tmp_path / "job.toml").write_text(JOB.format(url=bucket.url))
    for day in (1, 2):
        bucket.put(f"in/day={day}/x.parquet", texts(100 * day), row_group_size=64)
    return tmp_path


def invoke(*arguments: str, code: int = 0) -> Result:
    def opened(job, progress):
        return EchoBackend(tokenizer_dir())

    with mock.patch("batchinfer.runner.open_backend", opened), mock.patch("batchinfer.retrier.open_backend", opened):
        result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    return result


def test_a_job_is_looked_at_run_told_of_verified_and_cleaned(folder, bucket):
    out = f"{bucket.url}/out"
    assert "300 rows in 2 files" in invoke("validate", "job.toml").stdout
    assert invoke("plan", "job.toml", "--save").stderr.strip() == f"kept in {out}.batchinfer/prediction.json"
    ran = invoke("run", "job.toml")
    assert "row number 4" in ran.stdout and "300 rows · 5,180 tokens in, 5,180 out" in ran.stdout and out in ran.stdout
    assert "The job is complete" in invoke("run", "job.toml").stdout
    assert json.loads(invoke("status", out, "--json").stdout)["state"] == "complete"
    assert invoke("verify", "job.toml").stdout == f"300 rows in 6 parts as they were committed · {out}\n"
    manifest = bucket.get("out.batchinfer/manifest.json")
    assert [part["part"] for part in json.loads(manifest)["parts"]] == [
        name.removeprefix("out/") for name in bucket.names("out")
    ]
    assert bucket.get("out.batchinfer/_SUCCESS").endswith(b"manifest.json\n")
    assert invoke("report", out).stdout == f"{out}.batchinfer/report.html\n"
    assert invoke("report", out, "-o", f"{bucket.url}/pages/today.html").stdout == f"{bucket.url}/pages/today.html\n"
    assert b"<!doctype html>" in bucket.get("out.batchinfer/report.html")
    assert b"<!doctype html>" in bucket.get("pages/today.html")
    bucket.put("out/day=1/part-000000-9.parquet", b"rubbish")
    bucket.put("out.batchinfer/staged/000001.7", b"rubbish")
    bucket.put("out.batchinfer/wal/000001.7.arrows/00000000", b"rubbish")
    gone = json.loads(invoke("vacuum", out, "--json").stdout)["files"]
    assert {name.removeprefix(bucket.url) for name in gone} == {
        "/out/day=1/part-000000-9.parquet", "/out.batchinfer/staged/000001.7", "/out.batchinfer/wal/000001.7.arrows",
    }  # fmt: skip
    assert "nothing to remove" in invoke("vacuum", out).stdout
    assert sorted(p.name for p in folder.iterdir()) == ["job.toml", "plan"], "nothing is left on the disk"


def test_damage_is_found(folder, bucket):
    invoke("run", "job.toml")
    part = bucket.names("out")[0]
    data = bytearray(bucket.get(part))
    data[30] ^= 1
    bucket.put(part, bytes(data))
    assert f"{bucket.url}/{part}: its bytes are not those committed" in invoke("verify", "job.toml", code=6).stderr
    bucket.delete(part)
    assert f"{bucket.url}/{part} is missing" in invoke("run", "job.toml", code=6).stderr


def test_a_changed_job_forks_beside_and_the_forks_are_no_input(folder, bucket):
    bucket.put("all/x.parquet", texts(60))
    place = ("--set", f"input.path={bucket.url}/all", "--set", f"output.path={bucket.url}/all/out")
    invoke("run", "job.toml", *place)
    refused = invoke("run", "job.toml", *place, "--temperature", "1", code=4)
    assert "sampling.temperature: 0.0 -> 1.0" in refused.stderr
    forked = invoke("run", "job.toml", *place, "--temperature", "1", "--fork", "--json")
    assert json.loads(forked.stdout)["output"] == f"{bucket.url}/all/out-2"
    invoke("run", "job.toml", *place, "--temperature", "0.5", "--fork")
    assert len(bucket.read("all/out")) == len(bucket.read("all/out-2")) == len(bucket.read("all/out-3")) == 60


def test_objects_that_were_added_are_appended(folder, bucket):
    invoke("run", "job.toml")
    bucket.put("in/day=0/x.parquet", texts(30))
    assert "in/day=0/x.parquet was added" in invoke("run", "job.toml", code=4).stderr
    invoke("run", "job.toml", "--on-input-change", "append")
    assert len(bucket.read()) == 330
    assert "330 rows" in invoke("verify", "job.toml").stdout


def test_rows_are_answered_again_in_the_place_of_the_old_ones(folder, bucket):
    invoke("run", "job.toml", "--set", "sampling.max_tokens=8")
    before = bucket.names("out")
    assert set(bucket.read()["finish_reason"].to_pylist()) == {"length"}
    invoke(
        "retry",
        f"{bucket.url}/out",
        "--where",
        "id >= 100 AND finish_reason = 'length'",
        "--set",
        "sampling.max_tokens=99",
    )
    after = bucket.read()
    assert bucket.names("out") == before and len(after) == 300
    assert set(after.filter(after["id"].to_numpy() >= 100)["finish_reason"].to_pylist()) == {"stop"}
    assert "300 rows" in invoke("verify", "job.toml").stdout


def test_a_job_goes_to_a_hosted_model_and_comes_back(folder, bucket):
    invoke("export-openai", "job.toml", "-o", "batch.jsonl")
    lines = []
    for line in Path("batch.jsonl").read_text().splitlines():
        choice = {"index": 0, "message": {"content": "yes"}, "text": "yes", "finish_reason": "stop"}
        body = {"model": "hosted", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        answer = {"custom_id": json.loads(line)["custom_id"], "response": {"status_code": 200, "body": body}}
        lines.append(json.dumps(answer))
    Path("results.jsonl").write_text("\n".join(lines))
    invoke("import-openai", "job.toml", "results.jsonl", "-o", f"{bucket.url}/hosted")
    assert bucket.read("hosted")["completion"].to_pylist() == ["yes"] * 300


def test_an_output_that_holds_something_else_is_not_written_into(folder, bucket):
    bucket.put("out/mine.txt", b"1")
    assert "not empty (it holds mine.txt)" in invoke("run", "job.toml", code=2).stderr
    assert bucket.names("out") == ["out/mine.txt"]


def test_a_store_that_is_deaf_to_conditions_is_refused(folder, bucket):
    bucket.proxy.deaf = True
    said = invoke("run", "job.toml", code=2).stderr
    assert f"{bucket.url} does not honour If-None-Match" in said
    assert bucket.names("out") == bucket.names("out.batchinfer") == []


def test_folders_that_a_console_made_are_no_objects(folder, bucket):
    for name in ("out/", "out.batchinfer/", "in/", "in/day=1/", "in/day=3/"):
        bucket.fs.create_dir(f"{bucket.name}/{name}", recursive=True)
    assert "300 rows" in invoke("run", "job.toml").stdout
    assert "300 rows" in invoke("run", "job.toml", "--set", f"input.path={bucket.url}/in/*").stdout
    assert len(bucket.read()) == 300


def test_a_wrong_bucket_is_one_line(folder, bucket):
    for key in ("input.path", "output.path"):
        said = invoke("run", "job.toml", "--set", f"{key}=s3://no-such-bucket/x", code=2).stderr
        assert said.count("\n") == 1 and "there is no bucket s3://no-such-bucket" in said


def test_a_store_that_does_not_answer_is_one_line_and_75(folder, bucket, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    bucket.proxy.fault = lambda method, path: "reset"
    for command in (("run", "job.toml"), ("status", "job.toml"), ("verify", "job.toml"), ("validate", "job.toml")):
        said = invoke(*command, code=75).stderr
        assert said.count("\n") == 1 and "run the same command again" in said


# ---- what costs money or time


def test_of_a_wide_input_only_the_columns_that_are_needed_are_fetched(tmp_path, bucket):
    import numpy as np
    import pyarrow as pa

    ballast = pa.array(np.random.default_rng(0).bytes(1000) for _ in range(4000))
    bucket.put("in/wide.parquet", texts(4000).append_column("ballast", ballast), row_group_size=1000)
    bucket.proxy.sent = 0
    job = echo_job(tmp_path, input__path=f"{bucket.url}/in", output__path=f"{tmp_path}/out", output__columns=["id"])
    assert run_echo(job).job.rows == 4000
    assert bucket.proxy.sent < 400_000, "of 4 MB"


def test_finished_rows_outlive_the_machine_and_are_not_computed_again(tmp_path, bucket):
    bucket.put("in/x.parquet", texts(300))
    job = echo_job(
        tmp_path,
        input__path=f"{bucket.url}/in",
        output__path=f"{bucket.url}/out",
        checkpoint__unit_rows=1000,
        checkpoint__sync_seconds=0.05,
    )
    first = stopped(job)
    assert 0 < first.run.rows == first.logged < 300 and bucket.names("out") == []
    assert list(tmp_path.iterdir()) == [], "the log lies in the store alone"
    second = run_echo(job)
    assert second.run.rows == 300 - first.run.rows
    assert bucket.read()["id"].to_pylist() == list(range(300))
    assert not [name for name in bucket.names("out.batchinfer") if "/wal/" in name]


def test_a_sync_of_the_log_is_one_put_a_unit_however_many_rows_wait(tmp_path, bucket):
    bucket.put("in/x.parquet", texts(2000))
    puts = []

    def count(method, path):
        puts.extend([path] if "/wal/" in path and method == "PUT" else [])

    bucket.proxy.fault = count
    stopped(echo_job(tmp_path, input__path=f"{bucket.url}/in", output__path=f"{bucket.url}/out",
                     checkpoint__unit_rows=2000, checkpoint__sync_seconds=None), after=1500)  # fmt: skip
    assert len(puts) == 1
