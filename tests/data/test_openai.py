"""To OpenAI's batch format and back, with a service of our own in between."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from click.testing import CliRunner

from batchinfer.cli import main
from batchinfer.data import openai_batch
from batchinfer.data.ledger import Ledger
from batchinfer.data.openai_batch import export_requests
from batchinfer.data.openai_results import import_results
from batchinfer.data.standing import standing
from batchinfer.errors import DriftError, InputError, OutputError
from tests.echo_jobs import echo_job, read_output, run_echo, texts, write


@pytest.fixture
def job(tmp_path):
    write(tmp_path / "in.parquet", texts(150), row_group_size=40)
    return echo_job(tmp_path, model__path="models/tiny")


def export(job, tmp_path, **kwargs: Any) -> tuple[list[dict], dict[str, str]]:
    """The requests of all files, and what was refused."""
    refused: dict[str, str] = {}
    done = export_requests(job, tmp_path / "batch.jsonl", kwargs.get("model", "gpt"), refused.__setitem__)
    requests = [json.loads(line) for path in done.files for line in path.read_bytes().splitlines()]
    assert (done.requests, done.failed) == (len(requests), len(refused))
    assert len({request["custom_id"] for request in requests}) == len(requests)
    return requests, refused


def answer(request: dict, **changes: Any) -> dict:
    """What a service says to a request."""
    n = request["body"]["n"]
    said = (request["body"].get("messages") or [{"content": request["body"].get("prompt")}])[-1]["content"]
    messages = [{"role": "assistant", "content": f"{said}!{i}", "refusal": None} for i in range(n)]
    choices = [{"index": i, "message": m, "finish_reason": "stop"} for i, m in reversed([*enumerate(messages)])]
    usage = {"prompt_tokens": len(said), "completion_tokens": 7 * n, "total_tokens": len(said) + 7 * n}
    body = {"object": "chat.completion", "model": "gpt-2026", "choices": choices, "usage": usage, **changes}
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {"id": "x", "custom_id": request["custom_id"], "response": response, "error": None}


def write_lines(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_request_is_what_the_api_documents(job, tmp_path):
    requests, refused = export(job, tmp_path)
    assert len(requests) == 150 and not refused
    assert requests[7] == {
        "custom_id": "in.parquet#7",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "gpt",
            "messages": [{"role": "user", "content": "Say row number 7"}],
            "max_completion_tokens": 256,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "n": 1,
        },
    }


def test_plain_prompts_ask_for_completions_and_rows_have_their_own_seed_id_and_sampling(tmp_path):
    table = pa.table({"id": ["a", None], "text": ["x", "y"], "most": [5, None]})
    write(tmp_path / "in" / "day=1" / "in.parquet", table)
    job = echo_job(
        tmp_path, tmp_path / "in", prompt__chat="off", input__id_column="id",
        sampling__temperature=0.5, sampling__n=2, sampling__stop=["\n"], sampling__columns={"max_tokens": "most"},
    )  # fmt: skip
    first, second = export(job, tmp_path)[0]
    assert (first["custom_id"], second["custom_id"]) == ("a@day=1/in.parquet#0", "day=1/in.parquet#1")
    assert first["url"] == "/v1/completions" and first["body"]["prompt"] == "Say x"
    assert (first["body"]["max_tokens"], second["body"]["max_tokens"]) == (5, 256)
    assert first["body"]["stop"] == ["\n"] and first["body"]["n"] == 2 and first["body"]["temperature"] == 0.5
    assert first["body"]["seed"] != second["body"]["seed"]


def test_messages_and_a_system_message_are_sent_as_the_model_would_see_them(tmp_path):
    talk = [[{"role": "user", "content": "hi", "name": None}], None, [{"role": "user", "content": " ", "name": None}]]
    write(tmp_path / "in.parquet", pa.table({"talk": talk, "tone": ["kind", "kind", "kind"]}))
    job = echo_job(tmp_path, prompt__template=None, prompt__messages="talk", prompt__system="Be {{ tone }}.")
    requests, refused = export(job, tmp_path)
    wanted = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    assert [request["body"]["messages"] for request in requests] == [wanted]
    assert list(refused) == ["in.parquet#1", "in.parquet#2"] and "is null" in refused["in.parquet#1"]


def test_files_keep_the_api_s_limits_and_all_of_them_appear_or_none(job, tmp_path, monkeypatch):
    monkeypatch.setattr(openai_batch, "MOST_REQUESTS", 60)
    requests, _ = export(job, tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("batch*"))] == ["batch-2.jsonl", "batch-3.jsonl", "batch.jsonl"]
    assert [r["custom_id"] for r in requests] == [f"in.parquet#{i}" for i in range(150)]
    with pytest.raises(OutputError, match="batch-2.jsonl exists already"):
        export(job, tmp_path)
    for path in tmp_path.glob("batch*"):
        path.unlink()
    monkeypatch.setattr(openai_batch, "MOST_BYTES", 10_000)
    export(job, tmp_path)
    files = list(tmp_path.glob("batch*"))
    assert len(files) > 3 and all(path.stat().st_size <= 10_000 for path in files)
    for path in files:
        path.unlink()
    monkeypatch.setattr(openai_batch, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="none of the 150 rows"):
        export(job, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]


def test_long_addresses_become_short_ids_that_are_still_unique(tmp_path):
    folder = "a-folder-with-a-long-name=" + "x" * 60
    write(tmp_path / "in" / folder / "in.parquet", texts(100))
    write(tmp_path / "in" / f"{folder}y" / "in.parquet", texts(100))
    ids = [request["custom_id"] for request in export(echo_job(tmp_path, tmp_path / "in"), tmp_path)[0]]
    assert max(map(len, ids)) <= 64 and len(set(ids)) == 200


def test_results_in_any_order_over_several_files_make_the_output_of_a_run(job, tmp_path):
    run_echo(job)
    of_a_run = read_output(tmp_path)
    requests, _ = export(job, tmp_path)
    random.Random(0).shuffle(requests)
    missing = requests.pop()["custom_id"]
    lines = [answer(request) for request in requests]
    paths = [write_lines(tmp_path / f"{i}.jsonl", lines[i::3]) for i in range(3)]
    imported = echo_job(tmp_path, model__path="models/tiny", output__path=str(tmp_path / "hosted" / "out"))
    summary = import_results(imported, paths)
    out = read_output(tmp_path / "hosted")
    assert out.schema == of_a_run.schema and out["id"].to_pylist() == list(range(150))
    for i, row in enumerate(out.to_pylist()):
        if f"in.parquet#{i}" == missing:
            assert row["finish_reason"] == "error" and missing in row["error"] and row["completion"] is None
        else:
            assert (row["completion"], row["completion_tokens"]) == (f"Say row number {i}!0", 7)
            assert (row["prompt_tokens"], row["finish_reason"], row["error"]) == (
                len(f"Say row number {i}"),
                "stop",
                None,
            )
    assert (summary.state, summary.job.rows, summary.job.failed, summary.run.rows) == ("complete", 150, 1, 150)
    assert standing(imported.output.path).state == "complete"
    with Ledger(imported.output.path) as ledger:
        assert ledger.verify() == 150
    told = json.loads((tmp_path / "hosted" / "out.batchinfer" / "manifest.json").read_bytes())
    assert told["model"] == "gpt-2026" and (tmp_path / "hosted" / "out.batchinfer" / "_SUCCESS").exists()
    assert pl.scan_parquet(imported.output.path).collect().height == 150
    assert import_results(imported, paths[::-1]).run.rows == 0  # it is done
    with pytest.raises(DriftError, match="engine.results"):
        import_results(imported, paths[:2])
    with pytest.raises(DriftError, match="engine.engine: 'openai-batch' -> 'echo'"):
        run_echo(imported)


def test_an_import_that_was_killed_goes_on(job, tmp_path, monkeypatch):
    lines = [answer(request) for request in export(job, tmp_path)[0]]
    path = write_lines(tmp_path / "results.jsonl", lines)
    commit = Ledger.commit

    def once(ledger, commits):
        commit(ledger, commits[:1])
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", once)
        with pytest.raises(OutputError):
            import_results(job, [path])
    assert read_output(tmp_path).num_rows == 64
    assert import_results(job, [path]).run.rows == 86 and read_output(tmp_path)["id"].to_pylist() == list(range(150))


def test_whatever_the_service_says_of_a_row_is_in_its_error(tmp_path):
    write(tmp_path / "in.parquet", texts(9))
    job = echo_job(tmp_path)
    requests = export(job, tmp_path)[0]
    lines = [answer(request) for request in requests]
    choice = {"index": 0, "message": {"content": "half"}, "finish_reason": "content_filter"}
    lines[0]["response"]["body"]["choices"] = [choice]
    lines[1] |= {"response": None, "error": {"code": "batch_expired", "message": "too late"}}
    lines[2]["response"] = {"status_code": 400, "body": {"error": {"code": None, "message": "bad \ud800"}}}
    lines[3]["response"]["body"]["choices"] *= 2
    lines[4]["response"]["body"]["choices"][0]["message"] = {"content": None, "refusal": "no"}
    lines[5]["response"]["body"] = None
    lines[6]["response"]["body"]["choices"][0] = {"index": 0, "text": "plain \ud800", "finish_reason": "length"}
    lines[7]["response"]["body"] |= {"usage": None}
    lines[8]["response"]["body"]["choices"] = ["?"]
    import_results(job, [write_lines(tmp_path / "results.jsonl", lines)])
    rows = read_output(tmp_path).to_pylist()
    assert [row["error"] for row in rows] == [
        "the service ended the completion for another reason: content_filter", "batch_expired: too late",
        "error: bad ?", "the result has 2 completions, and sampling.n is 1", "the model refused: no",
        "the result has no completion (status code 200)", None, None,
        "the service ended the completion for another reason: None",
    ]  # fmt: skip
    assert rows[0]["completion"] == "half" and rows[6]["completion"] == "plain ?"
    assert [row["finish_reason"] for row in rows] == ["error"] * 6 + ["length", "stop", "error"]
    assert rows[7]["prompt_tokens"] is None and rows[7]["completion"] == "Say row number 7!0"


def test_several_completions_are_lists_in_their_order_without_tokens_of_each(tmp_path):
    write(tmp_path / "in.parquet", texts(2))
    job = echo_job(tmp_path, sampling__n=3)
    lines = [answer(request) for request in export(job, tmp_path)[0]]
    import_results(job, [write_lines(tmp_path / "results.jsonl", lines[:1])])
    first, second = read_output(tmp_path).to_pylist()
    assert first["completion"] == [f"Say row number 0!{i}" for i in range(3)] and first["finish_reason"] == ["stop"] * 3
    assert first["completion_tokens"] == [None] * 3
    assert second["completion"] is None and second["finish_reason"] == ["error"] and "no result" in second["error"]


@pytest.mark.parametrize(
    "how, said",
    [
        ("unknown", r"2.jsonl, line 3: no row of the input has the custom_id 'in.parquet#150' \(nor those of 1 other"),
        ("twice", r"2.jsonl, line 2: custom_id 'in.parquet#3' is answered at .*1.jsonl, line 4 already"),
        ("not JSON", r"2.jsonl, line 1: expected a JSON object, found b'\{\"custom"),
        ("no id", r'1.jsonl, line 1: expected a result line with a "custom_id"'),
        ("request", r"1.jsonl, line 2: expected a result with a response or an error, found none; is it a request\?"),
        ("gone", r"cannot read .*2.jsonl: No such file"),
    ],
)
def test_results_that_are_not_this_job_s_are_refused_before_anything_is_written(job, tmp_path, how, said):
    lines = [answer(request) for request in export(job, tmp_path)[0]]
    first, second = lines[:75], lines[75:]
    if how == "unknown":
        second[2:2] = [{**second[0], "custom_id": f"in.parquet#{i}"} for i in (150, 151)]
    elif how == "twice":
        second[1] = first[3]
    elif how == "no id":
        first[0] = {}
    elif how == "request":
        first[1] = json.loads((tmp_path / "batch.jsonl").read_bytes().splitlines()[1])
    paths = [write_lines(tmp_path / "1.jsonl", first), write_lines(tmp_path / "2.jsonl", second)]
    if how == "not JSON":
        Path(paths[1]).write_text('{"custom')
    elif how == "gone":
        Path(paths[1]).unlink()
    with pytest.raises(InputError, match=said):
        import_results(job, paths)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.batchinfer").exists()


def test_the_command_line_there_and_back(tmp_path):
    write(tmp_path / "in.parquet", pa.table({"text": ["a", None, "c"]}))
    toml = tmp_path / "job.toml"
    toml.write_text(
        f'[input]\npath = "{tmp_path}/in.parquet"\n[prompt]\ntemplate = "{{{{ text }}}}"\n[model]\npath = "tiny"\n'
        f'[output]\npath = "{tmp_path}/out"\n[sampling]\ntop_k = 5\n'
    )
    batch = tmp_path / "batch.jsonl"
    result = CliRunner().invoke(main, ["export-openai", str(toml), "-o", str(batch)])
    assert result.exit_code == 0 and result.stdout == f"2 requests (1 row cannot be asked) · {batch}\n"
    assert "row in.parquet#1 cannot be asked: " in result.stderr and "sampling.top_k" in result.stderr
    requests = [json.loads(line) for line in batch.read_text().splitlines()]
    assert {request["body"]["model"] for request in requests} == {"tiny"}
    results = write_lines(tmp_path / "r.jsonl", [answer(request) for request in requests])
    there = tmp_path / "hosted"
    result = CliRunner().invoke(main, ["import-openai", str(toml), results, "-o", str(there), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["job"]["failed"] == 1
    assert CliRunner().invoke(main, ["verify", str(there)]).exit_code == 0
    refused = CliRunner().invoke(
        main, ["export-openai", str(toml), "-o", str(tmp_path / "x.jsonl"), "--set", "limits.max_failed_fraction=0.1"]
    )
    assert refused.exit_code == 3
