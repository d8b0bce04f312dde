"""`plan` and `report` as they are typed."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchinfer.cli import main

from .conftest import DEMO_MODEL


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where commands are typed: a Parquet file and a job file lie there."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"text": ["One bird.", "<b>Two</b> birds.", None]}), "prompts.parquet")
    (tmp_path / "job.toml").write_text(
        f"""
        job.name = "birds & co"
        input.path = "prompts.parquet"
        prompt.template = "Count: {{{{ text }}}}"
        model.path = "{DEMO_MODEL}"
        engine.backend = "echo"
        output.path = "out"
        """
    )
    return tmp_path


def invoke(*words: str):
    return CliRunner().invoke(main, words)


def test_plan_foretells_and_writes_nothing(demo_tokenizer_dir, folder):
    result = invoke("plan", "job.toml", "--tok-s", "100")
    assert result.exit_code == 0, result.output
    assert "3 rows in 1 file" in result.stdout and "█" in result.stdout and "100 tok/s as told" in result.stdout
    assert "1 sampled row failed (33.3%)" in result.stdout and "One bird" not in result.stdout
    assert not (folder / "out.batchinfer").exists()


def test_plan_as_json_is_kept_when_asked(demo_tokenizer_dir, folder):
    result = invoke("plan", "job.toml", "--json", "--save", "--sample", "2")
    told = json.loads(result.stdout)
    assert (told["rows"], told["sampled"], told["seconds"]) == (3, 2, None) and "kept in" in result.stderr
    assert json.loads((folder / "out.batchinfer" / "prediction.json").read_bytes()) == told


def test_plan_wants_sense():
    assert invoke("plan", "job.toml", "--tok-s", "0").exit_code == 2
    assert invoke("plan", "job.toml", "--sample", "0").exit_code == 2
    assert invoke("plan", "missing.toml").exit_code == 2


def test_report_writes_one_page_beside_the_output_or_where_it_is_told(demo_tokenizer_dir, folder):
    assert "no job was begun" in invoke("report", "out").stderr
    invoke("run", "job.toml", "-q")
    beside = folder / "out.batchinfer" / "report.html"
    assert invoke("report", "job.toml").stdout.strip() == str(beside)
    assert "birds &amp; co" in beside.read_text() and "&lt;b&gt;Two" in beside.read_text()
    assert invoke("report", "out", "-o", "here.html", "--samples", "0").exit_code == 0
    assert "Two" not in (folder / "here.html").read_text()
    assert "cannot write nowhere/x.html" in invoke("report", "out", "-o", "nowhere/x.html").stderr
