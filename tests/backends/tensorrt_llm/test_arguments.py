from __future__ import annotations

import json

import pytest

from batchinfer.backends.tensorrt_llm.arguments import (
    Limits,
    check,
    environment,
    llm_arguments,
    sampling_arguments,
    seeds_decide,
)
from batchinfer.backends.tensorrt_llm.backend import TensorRTBackend
from batchinfer.backends.tensorrt_llm.plan import model_folder
from batchinfer.backends.tensorrt_llm.versions import Release, installed, needed
from batchinfer.errors import JobError, ModelError
from batchinfer.job import Job
from batchinfer.request import SamplingParams
from tests.backends.tensorrt_llm.site import ROOT, VERSIONS, make_job

PENALISED = {"sampling__repetition_penalty": 1.1}
DRAWN = {"sampling__temperature": 0.7}


def arguments(tmp_path, model, version, **changes):
    job = make_job(tmp_path, model, **changes)
    return llm_arguments(job, Release(version), model, Limits.of(job.engine, model_folder(str(model))))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_job_in_the_words_of_every_version_is_understood_by_it(tmp_path, model, put, version):
    changes = {"engine__tp": 2, "engine__pp": 2, "engine__tensorrt__capacity_policy": "max_utilization"}
    put(version)
    from tensorrt_llm import LLM

    for more in ({}, DRAWN, {"build__kv_dtype": "fp8", "engine__prefix_sharing": False}):
        given = arguments(tmp_path, model, version, **changes, **more)
        llm = LLM(**given)
        llm.shutdown()
        args = llm.args
        assert (args.tensor_parallel_size, args.pipeline_parallel_size) == (2, 2)
        assert (args.max_batch_size, args.max_num_tokens, args.max_seq_len) == (8, 8192, 512)
        assert args.enable_chunked_prefill and args.cuda_graph_config.enable_padding
        assert args.cuda_graph_config.max_batch_size == 8
        assert args.scheduler_config.capacity_scheduler_policy == "MAX_UTILIZATION"
        assert args.kv_cache_config.enable_block_reuse is given["kv_cache_config"]["enable_block_reuse"]
    assert args.kv_cache_config.dtype == "fp8" and not args.kv_cache_config.enable_block_reuse


@pytest.mark.parametrize(
    ("version", "greedy", "drawn"),
    [
        ("1.0.0", {"use_torch_sampler": True}, {"use_torch_sampler": False}),
        ("1.2.1", {"sampler_type": "TorchSampler"}, {"sampler_type": "TRTLLMSampler"}),
        ("1.3.0rc25", {"sampler_type": "TorchSampler"}, {"sampler_type": "TRTLLMSampler"}),
        ("1.3.0rc26", {}, {}),
    ],
)
def test_rows_that_are_drawn_or_penalised_go_to_the_sampler_that_heeds_their_seeds(
    tmp_path, model, version, greedy, drawn
):
    def sampler(**changes):
        given = arguments(tmp_path, model, version, **changes)
        return {name: value for name, value in given.items() if "sampler" in name}

    assert sampler() == greedy
    for asked in (DRAWN, PENALISED, {"sampling__columns": {"min_p": "c"}}, {"sampling__columns": {"seed": "c"}}):
        assert sampler(**asked) == drawn


def test_what_a_version_would_pass_over_is_refused_by_name(tmp_path, model):
    def refusal(version, **changes):
        with pytest.raises(JobError) as caught:
            check(make_job(tmp_path, model, **changes), Release(version))
        return str(caught.value)

    scheme = refusal("1.2.1", build__quantization="int8_sq")
    assert 'build.quantization = "int8_sq" needs engine.tensorrt.flavour = "engine"' in scheme
    assert 'build.kv_dtype = "int8" needs' in refusal("1.2.1", build__kv_dtype="int8")
    assert "build.group_size is not for" in refusal("1.2.1", build__group_size=64)
    native = refusal("1.2.1", build__quantization="gptq")
    assert 'build.quantization = "gptq" is the native engine\'s' in native and "nvfp4" in native
    assert "engine.pp_partition" in refusal("1.2.1", engine__pp_partition=[1, 2])
    engine = refusal("1.3.0rc21", engine__tensorrt__flavour="engine")
    assert "tensorrt_llm 1.3.0rc21" in engine and "1.3.0rc20" in engine
    seeds = refusal("1.4.0rc1", sampling__columns={"seed": "s"})
    assert "sampling.columns.seed" in seeds and "tensorrt_llm 1.4.0rc1" in seeds
    for version in VERSIONS:  # each has one sampler or another that knows these
        check(make_job(tmp_path, model, **PENALISED, sampling__min_p=0.1, **DRAWN), Release(version))
    check(make_job(tmp_path, model, engine__tensorrt__flavour="engine"), Release("1.3.0rc20"))
    check(make_job(tmp_path, model, engine__tensorrt__flavour="engine"), None)  # not known here


def test_whether_seeds_decide_is_known(tmp_path, model):
    greedy, drawn = make_job(tmp_path, model), make_job(tmp_path, model, **DRAWN)
    assert all(seeds_decide(greedy, Release(version)) for version in VERSIONS)
    assert [v for v in VERSIONS if not seeds_decide(drawn, Release(v))] == ["1.3.0rc27", "1.4.0rc1"]


@pytest.mark.parametrize("version", ["0.21.0", "1.5.0", "2.0", "unknown"])
def test_a_version_that_nobody_looked_at_is_refused_with_its_name(version):
    with pytest.raises(ModelError, match=rf"tensorrt_llm {version} is not known here: expected 1.0 to 1.4"):
        Release(version)


def test_pre_and_post_releases_belong_where_they_come_from():
    assert Release("1.3.0rc6.post2").has("engine flavour") and Release("1.2.0rc6.post3").has("C++ sampler")
    assert Release("1.1.0rc0").has("sampler_type") and not Release("1.0.3").has("sampler_type")
    assert Release("1.3.0").series == "1.3"


def test_what_is_installed_is_told_without_importing_it(put, tmp_path):
    assert installed() is None
    with pytest.raises(ModelError, match="needs tensorrt_llm, which is not installed: pip install"):
        needed()
    put("1.2.1", **{"import": "exit"})
    assert str(installed()) == "tensorrt_llm 1.2.1"


# ---- sampling


def in_words(version, put, index=0, **fields):
    put(version)
    from tensorrt_llm import SamplingParams as Theirs

    return Theirs(**sampling_arguments(SamplingParams(**fields), index, (256, 257)))


@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_is_greedy_and_drawn_is_drawn_in_every_version(put, version):
    assert in_words(version, put).greedy
    assert in_words(version, put, top_k=5, top_p=0.9, min_p=0.1).greedy  # filters change nothing of the best token
    assert not in_words(version, put, temperature=0.7).greedy
    assert not in_words(version, put, temperature=0.7, top_k=40, top_p=0.9).greedy


def test_every_field_is_said_out_loud(put):
    asked = {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2}
    said = in_words("1.2.1", put, **asked, seed=11, max_tokens=5, stop=("a", "b"), stop_token_ids=(9,))
    assert {name: getattr(said, name) for name in asked} == asked
    assert (said.seed, said.max_tokens, said.n, said.stop) == (11, 5, 1, ["a", "b"])
    assert said.stop_token_ids == [9, 256, 257]  # it knows one EOS by itself, the model has two
    assert in_words("1.2.1", put, ignore_eos=True, stop_token_ids=(9,)).stop_token_ids == [9]
    assert said.end_id is None  # else it would not tokenise the stop strings
    drawn = in_words("1.2.1", put, temperature=1.0)
    for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed"):  # None is filled from elsewhere
        assert getattr(drawn, name) is not None


def test_seeds_are_never_none_and_fit_64_bits_and_differ_between_the_completions_of_a_row():
    def seed(seed, index=0):
        return sampling_arguments(SamplingParams(seed=seed), index, ())["seed"]

    assert seed(0) == 0 and seed(5) == 5
    assert all(0 <= seed(s, i) < 2**63 for s in (-(2**63), -1, 2**63 - 1) for i in range(3))
    assert len({seed(5, i) for i in range(50)}) == 50


# ---- the process


def test_the_engine_does_not_join_the_mpi_job_that_it_was_started_from(tmp_path, model):
    scrub, own = environment(make_job(tmp_path, model), {}, tmp_path, "b7")
    assert set(scrub) == {"OMPI_", "PMIX_", "PMI_", "SLURM_"}
    assert own["TRTLLM_NO_USAGE_STATS"] == "1" and own["HF_HUB_OFFLINE"] == "1"
    assert own["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1" and "PMIX_HOSTNAME" not in own
    two = make_job(tmp_path, model, engine__tp=2, engine__threads=3)
    _, own = environment(two, {}, tmp_path, "b7")
    assert own["PMIX_HOSTNAME"] == "b7" and own["OMP_NUM_THREADS"] == "3"
    assert "TLLM_WORKER_USE_SINGLE_PROCESS" not in own
    launched, own = environment(two, {"TLLM_SPAWN_PROXY_PROCESS": "1"}, tmp_path, "b7")
    assert launched == () and "PMIX_HOSTNAME" not in own


def test_what_the_process_must_be_is_told_without_the_package_and_refused_before_one_is_started(tmp_path, model, put):
    put("1.2.1", **{"import": "exit"})
    wants = TensorRTBackend.isolation(make_job(tmp_path, model, engine__tensorrt__recycle_rows=9))
    assert wants.recycle_rows == 9 and "SLURM_" in wants.scrub and wants.environ["TRTLLM_NO_USAGE_STATS"] == "1"
    put("1.4.0rc1")
    with pytest.raises(JobError, match="1.4.0rc1"):
        TensorRTBackend.isolation(make_job(tmp_path, model, engine__tensorrt__flavour="engine"))


# ---- the job file


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"engine__backend": "native", "engine__tensorrt__recycle_rows": 5}, 'the backend is "native"'),
        ({"engine__device": "cpu"}, "needs an NVIDIA GPU"),
        ({"engine__isolation": "none"}, "needs its own process"),
        ({"engine__kv_cache_gib": 2.0}, "engine.tensorrt.kv_cache_fraction"),
        (
            {"engine__tensorrt__flavour": "engine", "engine__tensorrt__guided_decoding_backend": "llguidance"},
            'needs flavour = "pytorch"',
        ),
        ({"engine__tensorrt__guided_json": "{"}, "guided_json is not JSON"),
        ({"engine__tensorrt__guided_json": "[]"}, "guided_json must be a JSON object"),
        ({"engine__tensorrt__kv_cache_fraction": 1.0}, "engine.tensorrt.kv_cache_fraction (command line)"),
        ({"engine__tensorrt__flavor": "engine"}, "did you mean 'flavour'?"),
    ],
)
def test_contradictions_in_the_job_are_told_before_anything_is_looked_up(tmp_path, changes, wanted):
    with pytest.raises(JobError) as caught:
        make_job(tmp_path, "m", **changes)
    assert wanted in str(caught.value)


def test_the_example_job_is_one():
    job = Job.load(ROOT / "jobs" / "tensorrt_llm.toml", environ={})
    check(job, Release("1.2.1"))
    assert job.engine.backend == "tensorrt-llm"


def test_limits_come_from_the_profile_and_from_what_the_model_knows(tmp_path, model):
    source = model_folder(str(model))
    assert Limits.of(make_job(tmp_path, model).engine, source) == Limits(8, 8192, 512)
    small = make_job(tmp_path, model, engine__profile__step_tokens=4, engine__profile__seq_len=100)
    assert Limits.of(small.engine, source) == Limits(8, 8, 100)
    with pytest.raises(ModelError, match="more than the 512 positions"):
        Limits.of(make_job(tmp_path, model, engine__profile__seq_len=513).engine, source)


def test_arguments_can_be_written_down(tmp_path, model):
    assert json.loads(json.dumps(arguments(tmp_path, model, "1.2.1"))) == arguments(tmp_path, model, "1.2.1")
