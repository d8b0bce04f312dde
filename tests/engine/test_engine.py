"""What the engine promises to whoever calls it."""

from __future__ import annotations

import dataclasses
import platform
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from batchinfer import BatchInferError, Engine, Request, SamplingParams
from batchinfer.engine.build import build, rebuild
from batchinfer.engine.plan import FORMAT, EnginePlan, describe
from batchinfer.engine.text import Text
from batchinfer.errors import EngineError, ModelError
from batchinfer.host import cpu_flags
from tests.engine.tiny import DEVICES, make_model, make_tokenizer

SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module", params=DEVICES)
def engine(model, request):
    return Engine(model, dtype="float32", device=request.param, batch_size=64, step_tokens=256, seq_len=256)


def ids(seed: int, length: int = 30) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def only(completions):
    (completion,) = completions
    return completion


def test_a_row_gets_the_same_tokens_alone_and_in_a_batch_of_64(engine):
    together = {c.key: c.outputs[0].token_ids for c in engine.generate([ids(i, 5 + i) for i in range(64)], SAMPLED)}
    for i in range(64):
        assert only(engine.generate([ids(i, 5 + i)], SAMPLED)).outputs[0].token_ids == together[i]


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same(engine):
    def with_seed(seed):
        params = SamplingParams(max_tokens=24, temperature=1.5, seed=seed)
        return only(engine.generate([ids(0)], params)).outputs[0].token_ids

    assert with_seed(1) == with_seed(1) != with_seed(2)


def test_n_completions_come_together_differ_and_share_the_prompt(engine):
    params = SamplingParams(max_tokens=16, temperature=1.5, n=4, seed=5)
    completion = only(engine.generate([ids(100, 100)], params))
    assert len({tuple(o.token_ids) for o in completion.outputs}) == 4
    full_pages = 99 // engine.stage.page_size * engine.stage.page_size
    assert completion.cached_tokens >= 3 * full_pages > 0
    first = only(engine.generate([ids(100, 100)], SamplingParams(max_tokens=16, temperature=1.5, seed=5)))
    assert first.outputs[0].token_ids == completion.outputs[0].token_ids


def test_a_stop_string_ends_a_completion_and_is_cut_off(engine):
    free = only(engine.generate([ids(3)], SamplingParams(max_tokens=30, ignore_eos=True))).outputs[0]
    stop = free.text[4:7]
    stopped = only(engine.generate([ids(3)], SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,)))).outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert len(stopped.token_ids) < len(free.token_ids)


def test_a_stop_token_ends_a_completion_and_is_not_in_its_text(engine):
    free = only(engine.generate([ids(4)], SamplingParams(max_tokens=30, ignore_eos=True))).outputs[0]
    token = free.token_ids[6]
    cut = free.token_ids.index(token)
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(token,))
    stopped = only(engine.generate([ids(4)], params)).outputs[0]
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", free.token_ids[: cut + 1])
    assert stopped.text == engine.text.decode(free.token_ids[:cut])


def test_a_control_token_may_be_named_as_a_stop_string(engine):
    check = engine.text.stop_check(("</s>",), ())
    assert check(np.array([65, 66, 257]))
    assert not check(np.array(engine.text.encode("/s>")))


def test_an_end_of_sequence_token_is_not_in_the_text_whatever_the_tokenizer_thinks_of_it(engine):
    free = only(engine.generate([ids(4)], SamplingParams(max_tokens=30, ignore_eos=True))).outputs[0]
    token = free.token_ids[6]
    cut = free.token_ids.index(token)
    plan = dataclasses.replace(engine.plan, eos_token_ids=(token,))
    ended = only(Engine(plan).generate([ids(4)], SamplingParams(max_tokens=30))).outputs[0]
    assert (ended.finish_reason, ended.token_ids) == ("stop", free.token_ids[: cut + 1])
    assert ended.text == engine.text.decode(free.token_ids[:cut])


def test_truncation_and_padding_left_in_a_tokenizer_file_do_nothing(tmp_path):
    tokenizer = make_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path)
    assert len(text.encode("hello world")) == 11 and len(text.encode("h")) == 1


def test_requests_are_pulled_only_when_there_is_room_and_none_means_go_on(model):
    engine = Engine(model, dtype="float32", device="cpu", batch_size=4, step_tokens=64, seq_len=128)
    pulled = 0

    def source():
        nonlocal pulled
        for i in range(40):
            yield None
            pulled += 1
            yield Request(i, ids(i), SamplingParams(max_tokens=6, ignore_eos=True))

    done = 0
    for _ in engine.generate(source()):
        done += 1
        assert pulled - done <= 4
    assert done == 40


def test_requests_that_cannot_be_served_come_back_as_errors_and_the_rest_goes_on(engine):
    prompts = [[], ids(1), ids(2, 256), ids(3, 255)]
    completions = {c.key: c for c in engine.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))}
    assert "empty" in completions[0].error
    assert "256 tokens" in completions[2].error and "at most 255" in completions[2].error
    assert len(completions[1].outputs[0].token_ids) == 8
    assert completions[3].outputs[0].finish_reason == "length" and len(completions[3].outputs[0].token_ids) == 1


def test_an_engine_left_in_the_middle_can_be_used_again(engine):
    for _ in engine.generate([ids(i) for i in range(30)], SAMPLED):
        break
    assert engine.pages.held == 0
    assert len(list(engine.generate([ids(i) for i in range(5)], SAMPLED))) == 5


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 2, 400], "token id 400, the model knows 0 to 319"),
        ([1, -2], "token id -2"),
        ([1, 2**40], f"token id {2**40}"),
        ([1.5, 2.5], "flat list of token ids, got float64"),
        (np.zeros((2, 3), int), r"shape \(2, 3\)"),
    ],
)
def test_a_prompt_of_impossible_token_ids_is_an_error_of_its_own(engine, prompt, message):
    bad, good = sorted(engine.generate([prompt, np.array(ids(1))], SAMPLED), key=lambda c: c.key)
    assert re.search(message, bad.error)
    assert good.outputs == only(engine.generate([ids(1)], SAMPLED)).outputs


def test_an_engine_interrupted_within_a_step_finds_no_page_that_was_never_computed(model, engine, monkeypatch):
    prompt = ids(77, 100)
    expected = only(engine.generate([prompt], SAMPLED)).outputs
    other = Engine(engine.plan)
    with monkeypatch.context() as patch:
        patch.setattr(other.stage, "launch", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(other.generate([prompt], SAMPLED))
    assert other.pages.held == 0
    for cache in other.stage.caches:
        cache.zero_()
    assert only(other.generate([prompt], SAMPLED)).outputs == expected


def test_two_iterators_at_a_time_are_refused(engine):
    first = engine.generate([ids(1), ids(2)], SAMPLED)
    next(first)
    with pytest.raises(EngineError, match="close"):
        next(engine.generate([ids(3)], SAMPLED))
    assert len(list(first)) == 1
    assert len(list(engine.generate([ids(3)], SAMPLED))) == 1


def test_text_prompts_are_tokenised_and_completions_decoded(engine):
    completion = only(engine.generate(["hello"], SamplingParams(max_tokens=5, ignore_eos=True)))
    assert completion.prompt_tokens == 5
    assert isinstance(completion.outputs[0].text, str)


def test_a_built_plan_gives_the_same_tokens_and_is_found_again(model, tmp_path, engine, monkeypatch):
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    options = dict(dtype="float32", device=engine.plan.device, seq_len=256, progress=False)
    plan = build(str(model), tmp_path / "plan", **options)
    assert EnginePlan.load(tmp_path / "plan") == plan
    again = only(Engine(tmp_path / "plan").generate([ids(0)], SAMPLED))
    assert again.outputs == only(engine.generate([ids(0)], SAMPLED)).outputs
    cached = build(str(model), **options)
    assert cached.path.parent == tmp_path / "cache" / "engines"
    stamp = (cached.path / "plan.json").stat().st_mtime_ns
    assert (build(str(model), **options).path / "plan.json").stat().st_mtime_ns == stamp


def test_equal_builds_are_equal_byte_for_byte(model, tmp_path):
    for name in ("a", "b"):
        build(str(model), tmp_path / name, dtype="float32", device="cpu", progress=False)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_an_interrupted_build_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("batchinfer.engine.build.save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(str(model), tmp_path / "plan", progress=False)
    assert list(tmp_path.iterdir()) == []


def break_model(folder, how):
    if how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "torn":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    elif how == "shape":
        config = (folder / "config.json").read_text().replace('"intermediate_size": 80', '"intermediate_size": 96')
        (folder / "config.json").write_text(config)
    elif how == "family":
        (folder / "config.json").write_text('{"model_type": "mamba"}')
    elif how == "keys":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "no weights"),
        ("pickled", "pickled weights are never loaded"),
        ("torn", "not a readable safetensors"),
        ("shape", r"shape \[160, 48\], the config says \[192, 48\]"),
        ("family", "'mamba' is not supported; supported: llama, mistral"),
        ("keys", "has no 'num_attention_heads'"),
        ("json", "cannot read"),
        ("config", "no config.json"),
    ],
)
def test_a_model_that_cannot_be_used_gives_one_clear_error(tmp_path, how, message):
    folder = make_model(tmp_path / "model", "llama")
    break_model(folder, how)
    with pytest.raises(ModelError, match=message):
        build(str(folder), tmp_path / "plan", progress=False)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "gpu"}, "engine.device must be auto, cpu, cuda, got 'gpu'"),
        ({"dtype": "int8"}, "engine.dtype must be auto, float32 or bfloat16, got 'int8'"),
        ({"batch_size": -1}, "batch_size must be 0 .* got -1"),
        ({"kv_dtype": "int3"}, "build.kv_dtype must be auto, fp8 or int8, got 'int3'"),
        ({"kv_dtype": "fp8", "device": "cpu"}, '"fp8" is not for cpu devices: use "int8", which is as small'),
        ({"seq_len": 100_000}, "more than the 512 positions"),
    ],
)
def test_an_impossible_option_is_named(model, option, message):
    with pytest.raises(ModelError, match=message):
        Engine(model, **option)


def test_a_plan_is_not_bent_to_other_options(engine):
    assert Engine(engine.plan, dtype="float32", device="auto", batch_size=0).plan == engine.plan
    for options in ({"dtype": "bfloat16"}, {"seq_len": 128}, {"batch_size": 8}):
        with pytest.raises(ModelError, match="was built for"):
            Engine(engine.plan, **options)


def test_what_decides_tokens_is_described(engine):
    plan = engine.plan
    changed = [
        dataclasses.replace(plan, eos_token_ids=(1, 2)),
        dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, rms_norm_eps=1e-3)),
        dataclasses.replace(plan, dtype="bfloat16"),
        dataclasses.replace(plan, kv_dtype="fp8"),
    ]
    assert all(describe(other) != describe(plan) for other in changed)
    assert describe(dataclasses.replace(plan, path=plan.path / "moved")) == describe(plan)


def test_a_plan_of_another_device_is_refused_naming_both(model, tmp_path):
    plan = build(str(model), tmp_path / "plan", dtype="float32", device="cpu", progress=False)
    file = plan.path / "plan.json"
    file.write_text(file.read_text().replace(plan.fingerprint["device"], "CPU riscv64 RVV"))
    with pytest.raises(ModelError, match="built for CPU riscv64 RVV, this machine has CPU.*`run --rebuild`"):
        EnginePlan.load(plan.path)
    file.write_text(file.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(ModelError, match=f"has format 1, this version reads {FORMAT}.*`run --rebuild`"):
        Engine(plan.path)


def test_a_plan_of_another_device_is_built_again_in_its_place_as_it_was_made(model, tmp_path):
    asked = dict(dtype="float32", device="cpu", quantization="int8", max_quality_loss=9.0, progress=False)
    asked["profiles"] = [{"seq_len": 64, "batch_size": 8}, {"seq_len": {"opt": 80, "max": 200}, "batch_size": 4}]
    plan = build(str(model), tmp_path / "plan", **asked)
    file = plan.path / "plan.json"
    file.write_text(file.read_text().replace(plan.fingerprint["device"], "CPU riscv64 RVV"))
    (tmp_path / f".plan.fresh-{platform.node()}").mkdir()  # of one that was killed
    again = Engine(plan.path, rebuild_from=str(model), device="cpu", max_quality_loss=-1.0, progress=False).plan
    assert again == plan and again.digest == plan.digest
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_of_several_that_want_a_plan_built_again_one_builds(model, tmp_path, monkeypatch):
    plan = build(str(model), tmp_path / "plan", dtype="float32", device="cpu", progress=False)
    file = plan.path / "plan.json"
    file.write_text(file.read_text().replace(plan.fingerprint["device"], "CPU riscv64 RVV"))
    built, all_are_here = [], threading.Barrier(3, timeout=30)

    def counted(*args, **options):
        built.append(args)
        time.sleep(0.3)  # the others ask meanwhile
        return build(*args, **options)

    def again(_):
        all_are_here.wait()
        return rebuild(str(model), plan.path, device="cpu", progress=False)

    monkeypatch.setattr("batchinfer.engine.build.build", counted)
    with ThreadPoolExecutor(3) as threads:
        plans = list(threads.map(again, range(3)))
    assert len(built) == 1 and plans == [plan] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_plan_tells_all_that_it_depends_on(engine):
    told = engine.plan.fingerprint
    assert told.keys() == {"weights", "tensors", "tokenizer", "device", "torch", "cuda", "triton", "batchinfer"}
    assert all(told.values())
    extras = set(told["device"].split()[3:])
    assert engine.plan.device == "cuda" or extras <= cpu_flags()


def test_a_model_that_is_nowhere_is_named_with_what_would_do():
    with pytest.raises(BatchInferError, match="no model at nowhere/at-all.*Hugging Face folder.*smollm2"):
        Engine("nowhere/at-all")


def test_too_little_memory_for_one_sequence_is_said(model):
    with pytest.raises(ModelError, match="raise engine.kv_cache_gib or lower engine.profile.seq_len"):
        Engine(model, dtype="float32", device="cpu", kv_cache_gib=1e-6)
