from __future__ import annotations

import decimal
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import batchinfer.runner
from batchinfer.cli import main
from batchinfer.data.report import Summary
from batchinfer.errors import EngineError, ExitCode

from .conftest import DEMO_MODEL

ECHO = ("--set", "engine.backend=echo")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where commands are typed: a Parquet file and a job file lie there."""
    monkeypatch.chdir(tmp_path)
    rows = {"id": ["a", "b", "c"], "text": ["One bird.", "Two\n\nbirds.", None]}
    pq.write_table(pa.table(rows), "prompts.parquet")
    (tmp_path / "job.toml").write_text(
        f"""
        [input]
        path = "prompts.parquet"
        id_column = "id"
        [prompt]
        template = "Count: {{{{ text }}}}"
        [model]
        path = "{DEMO_MODEL}"
        [engine]
        backend = "echo"
        [output]
        path = "out"
        """
    )
    return tmp_path


def invoke(*words: str):
    return CliRunner().invoke(main, words)


def refused(code: int, *words: str) -> str:
    """The one line on stderr of a command that fails as it should."""
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == "" and result.stderr.startswith("batchinfer: ") and "Traceback" not in result.stderr
    return result.stderr


# ---- run


def test_run_ends_with_a_table_and_a_summary_line(demo_tokenizer_dir):
    result = invoke("run", "job.toml")
    assert result.exit_code == 0, result.output
    *table, last = result.stdout.splitlines()
    assert "completion" in table[1] and "finish_reason" in table[1]
    assert any("One bird." in line and "echo" in line for line in table)
    assert any("Two birds." in line for line in table)
    assert last.startswith("3 rows (1 failed)") and "tok/s" in last and last.endswith("out")
    assert pq.read_table("out").num_rows == 3


def test_the_table_is_no_wider_than_the_terminal(demo_tokenizer_dir, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    *table, _ = invoke("run", "job.toml", "--template", "{{ text }} and on and on " * 9).stdout.splitlines()
    assert max(map(len, table)) <= 60


def test_a_run_stopped_before_any_row_shows_no_table(monkeypatch):
    stopped = Summary(Path("out"), "stopped", ExitCode.STOPPED)
    monkeypatch.setattr(batchinfer.runner, "run", lambda *_, **__: stopped)
    result = invoke("run", "job.toml")
    assert result.exit_code == 75 and len(result.stdout.splitlines()) == 1 and "run again to go on" in result.stdout


def test_the_table_shows_cells_that_polars_cannot_and_a_column_once(demo_tokenizer_dir):
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    huge = pa.array([decimal.Decimal("1.5")], pa.decimal256(50, 2))
    pq.write_table(pa.table({"id": [1], "text": broken, "huge": huge, "error": ["none"]}), "prompts.parquet")
    words = ("--template", "{{ huge }} {{ text }} {{ error }}", "--set", 'output.columns=["text", "huge"]')
    result = invoke("run", "job.toml", "--set", "limits.max_failed_fraction=1", *words)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.replace("┆", " ").replace("│", " ").split())  # cells are wrapped
    assert "1.50" in shown and "not valid" in shown and "1 row (1 failed)" in shown


def test_a_second_run_says_that_the_job_is_complete(demo_tokenizer_dir):
    invoke("run", "job.toml")
    result = invoke("run", "job.toml")
    assert result.exit_code == 0 and result.stdout.startswith("The job is complete: 3 rows")


def test_run_without_a_file_is_told_all_by_flags(demo_tokenizer_dir):
    words = ("-i", "prompts.parquet", "-o", "other", "-m", DEMO_MODEL, "--template", "{{ id }}", "--max-tokens", "2")
    result = invoke("run", *words, *ECHO, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["job"]["ok"] == 3
    assert pq.read_table("other")["completion_tokens"].to_pylist() == [2, 2, 2]


def test_quiet_prints_the_summary_alone(demo_tokenizer_dir):
    result = invoke("run", "job.toml", "-q")
    assert len(result.stdout.splitlines()) == 1 and result.stderr == ""


def test_too_many_failed_rows_are_exit_code_3(demo_tokenizer_dir):
    result = invoke("run", "job.toml", "--set", "limits.max_failed_fraction=0.1")
    assert result.exit_code == 3
    assert "1 of 3 rows failed" in result.stderr and "'error' says why" in result.stderr
    assert "column 'text' is null" in pq.read_table("out")["error"].to_pylist()[2]


def test_a_changed_prompt_is_drift(demo_tokenizer_dir):
    invoke("run", "job.toml")
    assert "template" in refused(4, "run", "job.toml", "--template", "other {{ text }}")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("missing.toml",), "no job file at missing.toml"),
        (("job.toml", "--set", "engine.treads=2"), "did you mean 'threads'?"),
        (("job.toml", "--set", "threads=2"), "--set wants section.key=value"),
        (("job.toml", "-i", "nothing.parquet"), "no input at nothing.parquet"),
        (("job.toml", "-i", "job.toml"), "job.toml"),
        (("job.toml", "-m", "no-such-model"), "no model at no-such-model"),
        (("job.toml", "--template", "{{ txt }}"), "did you mean 'text'?"),
        (("job.toml", "--template", "{{ text"), "prompt.template is not a valid jinja2 template"),
        (("job.toml", "-o", "job.toml/out"), "job.toml"),
        ((), "nothing to run: name a job file"),
        (("-i", "prompts.parquet"), "missing output.path"),
    ],
)
def test_what_cannot_run_is_one_message_and_exit_code_2(words, wanted):
    assert wanted in refused(2, "run", *words)


def test_unknown_flags_and_commands_are_exit_code_2():
    assert invoke("run", "--fast").exit_code == invoke("fly").exit_code == 2


def test_an_expected_failure_has_no_traceback_and_an_unexpected_one_only_with_v(monkeypatch):
    def fail(error):
        def run(*_, **__):
            raise error

        monkeypatch.setattr(batchinfer.runner, "run", run)

    fail(EngineError("the engine is gone"))
    assert refused(1, "run", "job.toml") == "batchinfer: the engine is gone\n"
    fail(KeyError("x"))
    assert "unexpected KeyError: 'x'" in refused(1, "run", "job.toml")
    assert isinstance(invoke("run", "job.toml", "-v").exception, KeyError)
    fail(KeyboardInterrupt())
    assert "interrupted" in refused(130, "run", "job.toml")


# ---- the others


def test_validate_checks_without_running(demo_tokenizer_dir, folder):
    result = invoke("validate", "job.toml")
    assert result.exit_code == 0 and "3 rows in 1 file, uses text" in result.stdout
    tried = invoke("validate", "job.toml", "--rows", "10", "--json")
    found = json.loads(tried.stdout)
    assert (tried.exit_code, found["tried"], list(found["failures"])) == (3, 3, ["2"])
    assert not (folder / "out").exists() and not (folder / "out.batchinfer").exists()


@pytest.mark.parametrize(
    "setting", ["model.path=nope", "input.path=nope", "output.columns=nope", "input.id_column=nope", "engine.plan=nope"]
)
def test_validate_finds_what_would_stop_the_run(setting):
    assert "nope" in refused(2, "validate", "job.toml", "--set", setting)


def test_validate_counts_rows_over_all_files(demo_tokenizer_dir):
    for name in ("1", "2"):
        pq.write_table(pa.table({"id": ["a", "b"], "text": pa.array([None, "x"])}), f"{name}.parquet")
    result = invoke("validate", "job.toml", "--set", "input.path=[12].parquet", "--rows", "10", "--json")
    assert list(json.loads(result.stdout)["failures"]) == ["0", "2"]


def test_validate_passes_over_the_job_s_own_output_as_run_does(demo_tokenizer_dir):
    here = ("job.toml", "--set", "input.path=.")
    assert invoke("run", *here).exit_code == 0
    assert "3 rows in 1 file" in invoke("validate", *here).stdout


def test_status_and_verify_read_what_was_committed(demo_tokenizer_dir, folder):
    assert "no job was begun" in refused(2, "status", "out")
    assert "no job was begun" in refused(2, "verify", "out")
    assert not (folder / "out.batchinfer").exists()
    invoke("run", "job.toml")
    assert invoke("status", "job.toml").stdout.startswith("complete · 3 rows committed (1 failed)")
    assert json.loads(invoke("status", "out", "--json").stdout)["state"] == "complete"
    assert invoke("verify", "out").stdout.startswith("3 rows in 1 part as they were committed")
    [part] = (folder / "out").rglob("*.parquet")
    part.write_bytes(part.read_bytes()[:-9] + b"\0" * 9)
    assert part.name in refused(6, "verify", "out")


def test_init_writes_a_job_file_and_never_over_one():
    assert invoke("init", "jobs/new.toml").exit_code == 0
    assert invoke("validate", "jobs/new.toml").exit_code == 0
    assert "exists already" in refused(2, "init", "job.toml")


def test_build_needs_to_know_of_what():
    assert "name a job file, or a model with -m" in refused(2, "build")
    assert "no model at nope" in refused(2, "build", "-m", "nope")
    assert "did you mean 'dtype'?" in refused(2, "build", "-m", "nope", "--set", "engine.dtyp=float32")


@pytest.mark.parametrize(
    "words", [("engine", "--repeats", "0"), ("engine", "--requests", "0"), ("pipeline", "--rows", "0")]
)
def test_bench_measures_at_least_something(words):
    assert invoke("bench", *words).exit_code == 2


def test_bench_pipeline_is_one_json_line(demo_tokenizer_dir):
    assert "no model at nope" in refused(2, "bench", "pipeline", "-m", "nope")
    result = invoke("bench", "pipeline", "--rows", "100", "--repeats", "1")
    [line] = result.stdout.splitlines()
    assert json.loads(line)["rows"] == 100 and json.loads(line)["share_of_bare"] > 0


def test_help_costs_nothing():
    root = Path(__file__).parents[1]
    code = "import sys, batchinfer.cli; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert not any(f"'{heavy}'" in loaded for heavy in ("torch", "transformers", "polars", "pyarrow", "pydantic"))


@pytest.mark.parametrize("arguments, code", [(["--version"], 0), (["status", "nowhere"], 2)])
def test_the_console_leaves_with_its_code_after_all_that_is_registered_for_its_end(arguments, code):
    root = Path(__file__).parents[1]
    script = f"""
        import atexit, sys, threading
        from batchinfer import __main__ as console
        command_line = console.main
        def main(**how):
            atexit.register(print, "told at the end")
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            sys.stdout.write("not flushed yet, ")
            command_line(**how)
        console.main, sys.argv = main, ["batchinfer", *{arguments}]
        console.enter()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith("not flushed yet, ") and done.stdout.endswith("told at the end\n")


@pytest.mark.parametrize(
    ("words", "model", "calibrated", "fitted"),
    [
        (["job.toml"], DEMO_MODEL, DEMO_MODEL, None),
        (["--fit", "job.toml"], DEMO_MODEL, DEMO_MODEL, DEMO_MODEL),
        (["--calibrate", "job.toml"], DEMO_MODEL, DEMO_MODEL, None),
        (["-m", "other", "--calibrate", "job.toml"], "other", "other", None),
        (["-m", "other", "--fit", "job.toml"], "other", None, "other"),
        (["job.toml", "-m", "other"], "other", "other", None),
        (["-m", "other"], "other", None, None),
    ],
)
def test_a_build_takes_its_model_from_m_or_else_from_the_job_whose_rows_it_reads(
    monkeypatch, words, model, calibrated, fitted
):
    asked = {}

    def build_engine(job, output, **rows_of):
        asked.update(model=job.model.path, **{what: of and of.model.path for what, of in rows_of.items()})
        return Path("engine")

    monkeypatch.setattr("batchinfer.backends.build_engine", build_engine)
    result = invoke("build", *words)
    assert result.exit_code == 0 and result.stdout == "engine\n"
    assert asked == {"model": model, "calibrate": calibrated, "fit": fitted}
    assert ("engine.plan=engine" in result.stderr) == (fitted is not None)
