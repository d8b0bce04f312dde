from __future__ import annotations

import pytest

from batchinfer.errors import ExitCode, JobError
from batchinfer.job import Job, parse_value, starter

LEAST = {"input.path": "in.parquet", "prompt.template": "{{ t }}", "model.path": "m", "output.path": "out"}


def load(overrides=None, environ=None, file=None):
    return Job.load(file, LEAST | (overrides or {}), environ or {})


def problem(overrides=None, environ=None, file=None) -> str:
    with pytest.raises(JobError) as caught:
        load(overrides, environ, file)
    assert caught.value.exit_code is ExitCode.USAGE
    return str(caught.value)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text("[sampling]\nmax_tokens = 1\ntop_k = 1\nseed = 1\n[model]\npath = 'file'\n")
    environ = {"BATCHINFER_SAMPLING__TOP_K": "2", "BATCHINFER_SAMPLING__SEED": "2", "BATCHINFER_CACHE": "/x"}
    job = load({"sampling.seed": 3}, environ, file)
    assert (job.sampling.max_tokens, job.sampling.top_k, job.sampling.seed, job.sampling.top_p) == (1, 2, 3, 1.0)
    assert job.model.path == "m"


def test_a_string_may_stand_for_a_list_of_one():
    assert load({"input.path": ["a", "b"]}).input.path == ("a", "b")
    assert load().input.path == ("in.parquet",)
    assert load({"sampling.stop": "END"}).sampling.stop == ("END",)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ('["a", "b"]', ["a", "b"]), ("out/x", "out/x"), ('"3"', "3"), ("", "")],
)
def test_values_are_toml_where_they_can_be_and_text_otherwise(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"sampling.temprature": 1}, "unknown key 'sampling.temprature' (command line); did you mean 'temperature'?"),
        ({"smapling.seed": 1}, "unknown key 'smapling' (command line); did you mean 'sampling'?"),
        ({"engine.profile.batchsize": 1}, "did you mean 'batch_size'?"),
        ({"engine.zzz": 1}, "valid: backend, device"),
        ({"sampling.max_tokens": "many"}, "sampling.max_tokens (command line): input should be a valid integer"),
        ({"sampling.max_tokens": True}, "sampling.max_tokens"),
        ({"sampling.max_tokens": 0}, "max_tokens must be between 1 and 2147483647, got 0"),
        ({"sampling.temperature": float("nan")}, "temperature must be"),
        ({"sampling.columns": {"temprature": "x"}}, "did you mean 'temperature'?"),
        ({"sampling.columns": {"n": "x"}}, "no per-row parameter 'n'"),
        ({"engine.backend": "vllm"}, "got 'vllm'"),
        ({"engine.tp": 0}, "greater than or equal to 1, got 0"),
        ({"prompt.messages": "m"}, "give exactly one of template and messages"),
        ({"prompt.chat": "off", "prompt.system": "s"}, "contradicts"),
        ({"input.path": 3}, "input.path (command line)"),
        ({"input.path": ""}, "input.path (command line): string should have at least 1 character"),
        ({"input.path": []}, "input.path (command line): tuple should have at least 1 item"),
        ({"output.path": ""}, "output.path (command line): string should have at least 1 character"),
        ({"sampling": 3}, "sampling (command line)"),
        ({"model": "m"}, "model (command line)"),
        ({"job.name.x": 1, "job.name": "y", "job.name.z": 2}, "cannot set job.name.z: name is a value"),
    ],
)
def test_every_problem_names_its_key_and_where_it_came_from(overrides, wanted):
    assert wanted in problem(overrides)


def test_problems_of_a_file_are_told_with_its_name_and_all_at_once(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text("[sampling]\nmax_tokens = 0\n")
    assert f"sampling ({file}): max_tokens must be" in problem({"sampling.seed": 1}, file=file)
    file.write_text("[sampling]\nseeed = 1\n[engine]\ntp = 'two'\n")
    said = problem(file=file)
    assert f"'sampling.seeed' ({file})" in said and f"engine.tp ({file})" in said


def test_what_a_job_lacks_is_named_by_key():
    with pytest.raises(JobError) as caught:
        Job.load(None, {"input.path": "x"}, {})
    assert all(key in str(caught.value) for key in ("prompt.template", "model.path", "output.path"))


@pytest.mark.parametrize(
    ("content", "wanted"), [(None, "no job file at"), ("a = ", "not valid TOML"), (b"\xff", "cannot read the job file")]
)
def test_an_unusable_file_is_one_line(tmp_path, content, wanted):
    file = tmp_path / "job.toml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = problem(file=file)
    assert wanted in said and "\n" not in said
    assert "cannot read" in problem(file=tmp_path)


def test_environment_problems_say_so():
    assert "(environment)" in problem(environ={"BATCHINFER_ENGINE__TREADS": "2"})


def test_a_job_is_frozen_and_its_semantics_leave_out_how_it_is_run():
    job = load()
    with pytest.raises(Exception, match="frozen"):
        job.sampling.seed = 1
    elsewhere = load({"engine.threads": 7, "checkpoint.unit_rows": 7, "output.path": "other", "job.name": "x"})
    assert elsewhere.semantic() == job.semantic()
    assert load({"sampling.seed": 1}).semantic() != job.semantic()
    assert load({"prompt.template": "x"}).semantic() != job.semantic()


def test_the_starter_file_is_a_job_and_lists_every_key(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(starter())
    job = Job.load(file, environ={})
    assert job.sampling == load().sampling and job.engine == load().engine
    commented = [line for line in starter().splitlines() if line.startswith("# ") and " = " in line and "…" not in line]
    file.write_text(starter().replace("# messages", "#!messages"))
    for line in commented:  # each default, uncommented, is valid as it stands
        file.write_text(file.read_text().replace(line, line[2:]))
    assert Job.load(file, environ={}) == job
