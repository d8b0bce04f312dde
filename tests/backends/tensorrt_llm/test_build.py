"""The build and the plan that it leaves, with stand-ins for NVIDIA's tools in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer.backends.tensorrt_llm import build as module
from batchinfer.backends.tensorrt_llm.backend import TensorRTBackend
from batchinfer.backends.tensorrt_llm.build import build
from batchinfer.backends.tensorrt_llm.plan import TensorRTPlan, explain
from batchinfer.errors import JobError, ModelError
from batchinfer.request import Request
from tests.backends.tensorrt_llm.site import events, make_job, make_model
from tests.engine.tiny import make_model as make_tiny

ENGINE = {"engine__tensorrt__flavour": "engine"}
PROMPTS = [[72, 73, 74], [80, 81]]


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """A model, and a cache in which nothing was built."""
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    return make_model(tmp_path / "tiny")


@pytest.fixture
def site(put, tmp_path, monkeypatch):
    """``put``, also for the processes that a build starts; returns where the fake notes what it does."""

    def install(version="1.2.1", **faults):
        import os
        import sys

        put(version, log=str(tmp_path / "log"), **faults)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        return tmp_path / "log"

    return install


def opened(job):
    TensorRTBackend.open(job, progress=False).close()


def test_a_model_as_it_is_needs_no_build_and_one_shows_that_it_loads(tmp_path, fresh, site):
    log = site()
    job = make_job(tmp_path, fresh)
    opened(job)
    assert len(events(log, "load")) == 1
    plan = build(job, tmp_path / "plan", progress=False)
    assert len(events(log, "load")) == 2 and plan.checkpoint == fresh.resolve()
    assert not (plan.path / "checkpoint").exists() and (plan.tokenizer_dir / "tokenizer.json").is_file()
    assert sorted(p.name for p in plan.path.iterdir()) == ["plan.json", "tokenizer"]
    opened(make_job(tmp_path, fresh, engine__plan=str(plan.path)))


def test_an_engine_is_compiled_once_and_found_again_by_the_run(tmp_path, fresh, site):
    log = site()
    changes = {**ENGINE, "engine__tp": 2, "engine__profile__seq_len": 100, "build__kv_dtype": "fp8"}
    job = make_job(tmp_path, fresh, **changes)
    with pytest.raises(ModelError, match="not built yet: run `batchinfer build`"):
        opened(job)
    plan = build(job, progress=False)
    [made] = events(log, "compile")
    limits = {"max_batch_size": 8, "max_num_tokens": 8192, "max_seq_len": 100, "max_input_len": 100}
    assert {name: made["build_config"][name] for name in limits} == limits
    assert made["tp_size"] == 2 and made["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert (plan.checkpoint / "rank1.engine").is_file() and plan.flavour == "engine"
    assert build(job, progress=False).path == plan.path and len(events(log, "compile")) == 1
    backend = TensorRTBackend.open(job, progress=False)
    [done] = backend.generate(iter([Request(0, backend._llm.tokenizer.encode("say hello"))]))
    backend.close()
    assert done.outputs[0].text == "hello" and backend.max_seq_len == 100


def test_a_compiled_engine_is_quantised_with_the_jobs_own_prompts(tmp_path, fresh, site):
    log = site()
    job = make_job(tmp_path, fresh, **ENGINE, build__quantization="fp8")
    plan = build(job, tmp_path / "plan", iter(PROMPTS), progress=False)
    [made] = events(log, "compile")
    assert made["quantization"]["quant_algo"] == "FP8" and made["rows"] == 2
    assert plan.quantization == "fp8" and not (plan.path / "calibration").exists()
    other = build(job, tmp_path / "other", iter(PROMPTS[:1]), progress=False)
    assert other.fingerprint["calibration"] != plan.fingerprint["calibration"]
    with pytest.raises(ModelError, match="calibrates with prompts of the job"):
        build(job, tmp_path / "third", progress=False)
    assert not (tmp_path / "third").exists()


def test_a_checkpoint_is_quantised_with_the_jobs_own_prompts(tmp_path, monkeypatch, site):
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    site()
    tiny = make_tiny(tmp_path, "llama")
    job = make_job(tmp_path, tiny, build__quantization="int4_awq", engine__profile__seq_len=64, engine__dtype="float32")
    plan = build(job, tmp_path / "plan", iter([[3, 4, 5], [6] * 100]), progress=False, warm=False)
    made = json.loads((plan.checkpoint / "hf_quant_config.json").read_text())
    assert made["quantization"]["quant_algo"] == "W4A16_AWQ" and made["calibration"] == [3, 64]
    assert (plan.checkpoint / "tokenizer.json").is_file() and list(plan.checkpoint.glob("*.safetensors"))


def test_a_tool_that_fails_is_told_in_a_line_and_leaves_nothing(tmp_path, fresh, site):
    job = make_job(tmp_path, fresh, **ENGINE)
    for said, wanted in {
        "raise: CUDA out of memory": "lower engine.tensorrt.kv_cache_fraction",
        "raise: odd thing": "exit code 1: RuntimeError: odd thing",
        "kill": "the build ended with signal 9",
    }.items():
        site(load=said)
        with pytest.raises(ModelError) as caught:
            build(job, tmp_path / "plan", progress=False)
        assert wanted in str(caught.value) and "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir() if "plan" in p.name] == []


def test_a_models_own_code_is_never_run(tmp_path, fresh, site):
    site()
    config = json.loads((fresh / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.py"}}
    (fresh / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="brings its own code"):
        build(make_job(tmp_path, fresh, **ENGINE), tmp_path / "plan", progress=False)


# ---- whether a plan belongs here


def test_a_plan_for_another_gpu_or_version_is_refused_with_both_sides_named(tmp_path, fresh, site, monkeypatch):
    site()
    monkeypatch.setattr(module, "gpu_name", lambda: "H200 (sm_90)")
    plan = build(make_job(tmp_path, fresh, **ENGINE), tmp_path / "plan", progress=False)
    job = make_job(tmp_path, fresh, **ENGINE, engine__plan=str(plan.path))
    opened(job)
    monkeypatch.setattr(module, "gpu_name", lambda: "L40S (sm_89)")
    with pytest.raises(ModelError, match=r"built for H200 \(sm_90\), here is L40S \(sm_89\): build it again"):
        opened(job)
    monkeypatch.setattr(module, "gpu_name", lambda: "H200 (sm_90)")
    site("1.3.0rc20")
    with pytest.raises(ModelError, match="built for tensorrt_llm 1.2.1, here is tensorrt_llm 1.3.0rc20"):
        opened(job)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"engine__tp": 2}, "built with tp 1, the job asks for 2"),
        ({"engine__pp": 4}, "built with pp 1, the job asks for 4"),
        ({"engine__profile__seq_len": 99}, "built with profile.seq_len 512, the job asks for 99"),
        ({"engine__tensorrt__flavour": "pytorch"}, "built with flavour engine, the job asks for pytorch"),
        ({"build__kv_dtype": "fp8"}, "built with kv_dtype auto, the job asks for fp8"),
        ({"build__quantization": "fp8"}, "built with quantization none, the job asks for fp8"),
    ],
)
def test_a_plan_for_another_job_is_refused(tmp_path, fresh, site, change, wanted):
    site()
    plan = build(make_job(tmp_path, fresh, **ENGINE), tmp_path / "plan", progress=False)
    with pytest.raises(ModelError, match=wanted):
        opened(make_job(tmp_path, fresh, **{**ENGINE, "engine__plan": str(plan.path), **change}))


def test_a_plan_of_a_model_whose_weights_changed_is_refused(tmp_path, fresh, site):
    site()
    plan = build(make_job(tmp_path, fresh), tmp_path / "plan", progress=False, warm=False)
    weights = fresh / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="has other weights than the plan"):
        opened(make_job(tmp_path, fresh, engine__plan=str(plan.path)))


def test_weights_that_changed_are_another_engine_in_the_cache(tmp_path, fresh, site):
    site()
    job = make_job(tmp_path, fresh, **ENGINE)
    first = build(job, progress=False)
    weights = fresh / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    second = build(job, progress=False)
    assert first.path != second.path and first.fingerprint["weights"] != second.fingerprint["weights"]


def test_what_is_no_plan_is_told(tmp_path, fresh, site):
    site()
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "plan.json").write_text('{"format": 1}')
    for name, wanted in {"native": "has plan format 1", "tiny": "no engine plan: no plan.json"}.items():
        with pytest.raises(JobError, match=wanted):
            opened(make_job(tmp_path, fresh, engine__plan=str(tmp_path / name)))
    with pytest.raises(ModelError, match="exists already"):
        build(make_job(tmp_path, fresh), tmp_path / "native")


def test_what_was_made_of_a_model_needs_the_model_no_more(tmp_path, fresh, site):
    site()
    plan = build(make_job(tmp_path, fresh, **ENGINE), tmp_path / "plan", progress=False)
    fresh.rename(tmp_path / "gone")
    opened(make_job(tmp_path, fresh, **ENGINE, engine__plan=str(plan.path)))


def test_plans_come_back_as_they_were_saved(tmp_path, fresh, site):
    site()
    plan = build(make_job(tmp_path, fresh), tmp_path / "plan", progress=False, warm=False)
    assert TensorRTPlan.load(plan.path) == plan


def test_what_is_not_known_is_not_explained():
    assert explain("something else") is None
