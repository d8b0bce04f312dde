"""What the backend makes of tensorrt_llm's ways: each test is one of its documented traps."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest

from batchinfer.backends.tensorrt_llm import backend as module
from batchinfer.backends.tensorrt_llm.backend import WINDOW, TensorRTBackend
from batchinfer.errors import EngineError, JobError, ModelError
from batchinfer.request import Request, SamplingParams
from tests.backends.tensorrt_llm.site import VERSIONS, make_job, make_model

LATE = "1.4.0rc1"


def texts(completions):
    return [done.outputs[0].text if done.outputs else done.error for done in completions]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_answers(ask, version):
    done = ask("say hello", "other", version=version)
    assert texts(done) == ["hello", "ok other"]
    assert [completion.outputs[0].finish_reason for completion in done] == ["stop", "stop"]
    assert [completion.prompt_tokens for completion in done] == [9, 5]
    assert done[0].outputs[0].token_ids[-1] == 256  # the final stop token is counted, and not said


def test_in_flight_is_bounded_however_many_wait(ask):
    seen = []
    prompts = [f"say {i}" for i in range(200)]
    done = ask(
        *prompts, look=lambda backend: seen.append(backend._executor.peak_pending), engine__profile__batch_size=4
    )
    assert texts(done) == [str(i) for i in range(200)]
    assert 4 < seen[0] <= WINDOW * 4


def test_requests_are_pulled_as_there_is_room_and_none_is_waited_for_with_work_under_way(tmp_path, model, put):
    put("1.2.1")
    backend = TensorRTBackend.open(make_job(tmp_path, model, engine__profile__batch_size=1), progress=False)
    encode, pulled = backend._llm.tokenizer.encode, []

    def requests():
        for i in range(20):
            pulled.append(i)
            yield Request(i, encode(f"say {i}"))
            yield None  # nothing ready

    running = backend.generate(requests())
    first = next(running)
    assert first.outputs[0].text == str(first.key) and len(pulled) <= WINDOW + 1
    assert len(list(running)) == 19
    backend.close()


def test_bad_prompts_never_reach_the_executor_so_their_number_cannot_end_it(ask):
    bad = [[], [999], [-1], [1] * 600] * 10
    good = [f"say {i}" for i in range(40)]
    mixed = [prompt for pair in zip(bad, good) for prompt in pair]
    done = ask(*mixed, version=LATE)
    assert texts(done)[1::2] == [str(i) for i in range(40)]
    said = texts(done)[:8:2]
    assert "the prompt is empty" in said[0] and "token id 999, the model knows 0 to 257" in said[1]
    assert "token id -1" in said[2] and "600 tokens, the engine's profile takes at most 511" in said[3]
    assert not any(completion.retryable for completion in done)


def test_ids_of_any_kind_are_given_as_pythons_own(ask):
    assert texts(ask(np.array([82, 64, 88, 220, 71], np.int32), (82, 64, 88, 220, 72))) == ["h", "i"]


def test_a_refused_request_is_its_own_failure_and_the_rest_goes_on(ask):
    done = ask("!refuse", *(f"say {i}" for i in range(20)))
    assert "refused" in done[0].error and not done[0].retryable and texts(done)[1:] == [str(i) for i in range(20)]
    assert "out of memory" in ask("!oom", "say x")[0].error  # the executor gave up that request and goes on


@pytest.mark.parametrize(
    ("word", "error", "retryable"),
    [
        ("!timeout", "ended the request early: timeout", False),
        ("!unfinished", "ended the request early: not_finished", False),
        ("!nothing", "ended the request early: no finish reason", False),
        ("!cancel", "cancelled", True),
    ],
)
def test_only_stop_and_length_are_answers(ask, word, error, retryable):
    [done, innocent] = ask(word, "say x")
    assert error in done.error and done.retryable is retryable and innocent.outputs[0].text == "x"


@pytest.mark.parametrize("word", ["!background", "!cuda"])
def test_what_no_request_is_to_blame_for_ends_it_and_says_why(ask, word):
    with pytest.raises(EngineError, match="background thread|illegal memory access"):
        ask(word, *(f"say {i}" for i in range(50)))


def test_a_burst_of_errors_that_ends_the_executor_is_told_as_such(ask):
    with pytest.raises(EngineError):
        ask(*(f"!refuse {i}" for i in range(30)), version=LATE)
    assert len(ask(*(f"!refuse {i}" for i in range(30)), version="1.2.1")) == 30


def test_an_engine_that_hangs_is_given_up(ask):
    begun = time.monotonic()
    with pytest.raises(EngineError, match="no result for 0.3 s"):
        ask("say x", "!freeze", "say y", limits__engine_timeout="0.3s")
    assert time.monotonic() - begun < 30  # not an hour


def test_one_lost_request_does_not_hold_up_the_rest_and_may_be_asked_again(ask):
    prompts = ["!hang", *(f"say {i}" for i in range(60))]
    done = ask(*prompts, faults={"compute_seconds": 0.1}, limits__engine_timeout="0.5s", engine__profile__batch_size=4)
    assert "no answer within 1 s" in done[0].error and done[0].retryable
    assert texts(done)[1:] == [str(i) for i in range(60)]


def test_an_end_that_does_not_come_is_not_waited_for(ask, monkeypatch):
    monkeypatch.setattr(module, "SHUTDOWN", 0.1)
    assert texts(ask("say x", faults={"shutdown": "hang"})) == ["x"]
    assert any(thread.name == "batchinfer-shutdown" for thread in threading.enumerate())


def test_a_caller_that_stops_listening_leaves_nothing_behind(tmp_path, model, put):
    put("1.2.1", compute_seconds=0.01)
    backend = TensorRTBackend.open(make_job(tmp_path, model), progress=False)
    encode = backend._llm.tokenizer.encode
    running = backend.generate(Request(i, encode(f"say {i}")) for i in range(100))
    next(running)
    running.close()
    assert backend.load().running == 0
    again = list(backend.generate(iter([Request("k", encode("say again"))])))
    assert [(done.key, done.outputs[0].text) for done in again] == [("k", "again")]
    backend.close()


def test_the_executor_is_held_for_as_long_as_the_backend(tmp_path, model, put):
    put("1.2.1")
    backend = TensorRTBackend.open(make_job(tmp_path, model), progress=False)
    backend._llm._executor = None
    gc.collect()
    assert backend._executor is not None and not backend._executor.is_shutdown()


def test_load_counts_what_was_done(ask):
    seen = []
    ask("say abc", [], "say d", look=lambda backend: seen.append(backend.load()))
    assert (seen[0].prompt_tokens, seen[0].completion_tokens, seen[0].running, seen[0].waiting) == (12, 6, 0, 0)


# ---- sampling


def test_completions_of_a_row_are_requests_with_seeds_of_their_own(ask):
    sampling = SamplingParams(max_tokens=64, temperature=1.0, seed=5, n=3)
    asked = {"sampling": sampling, "sampling__temperature": 1.0}
    [done] = ask("say x", **asked)
    said = [output.text for output in done.outputs]
    assert len(set(said)) == 3 and all(text.startswith("x #") for text in said)
    [again, _] = ask("say x", "say y", **asked)
    assert [output.text for output in again.outputs] == said
    [one] = ask("say x", sampling=SamplingParams(max_tokens=64, temperature=1.0, seed=5), sampling__temperature=1.0)
    assert one.outputs[0].text == said[0]


def test_greedy_rows_may_have_several_completions_too(ask):
    [done] = ask("say x", sampling=SamplingParams(n=2))
    assert [output.text for output in done.outputs] == ["x", "x"]


def test_one_bad_completion_fails_its_row_alone(ask):
    [failed, fine] = ask("!refuse", "say x", sampling=SamplingParams(n=3))
    assert "refused" in failed.error and not failed.outputs and len(fine.outputs) == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_no_version_passes_over_min_p_or_the_penalty(ask, version):
    asked = {"repetition_penalty": 1.5, "min_p": 0.25, "temperature": 1.0}
    [done] = ask(
        "say x",
        version=version,
        sampling=SamplingParams(max_tokens=64, **asked),
        **{f"sampling__{name}": value for name, value in asked.items()},
    )
    assert done.outputs[0].text.endswith("penalty 1.5 min_p 0.25")


def test_the_models_own_defaults_fill_nothing_in(tmp_path, ask):
    eager = make_model(tmp_path / "eager", {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3})
    assert texts(ask("say x", version=LATE, model=eager)) == ["x"]  # greedy, not penalised
    drawn = SamplingParams(max_tokens=64, temperature=1.0)
    [done] = ask("say x", version=LATE, model=eager, sampling=drawn, sampling__temperature=1.0)
    assert "penalty" not in done.outputs[0].text


def test_rows_that_are_drawn_together_are_told_where_seeds_do_not_decide(tmp_path, model, put, capfd):
    def opened(version, **changes):
        put(version)
        TensorRTBackend.open(make_job(tmp_path, model, **changes)).close()
        return capfd.readouterr().err

    assert f"tensorrt_llm {LATE} draws rows of a batch together" in opened(LATE, sampling__temperature=1.0)
    assert "draws" not in opened(LATE) and "draws" not in opened("1.2.1", sampling__temperature=1.0)


# ---- where a completion ends


def ended(done):
    [output] = done.outputs
    return output.text, len(output.token_ids), output.finish_reason


def test_a_completion_ends_at_max_tokens(ask):
    assert ended(*ask("say abcdef", sampling=SamplingParams(max_tokens=3))) == ("abc", 3, "length")


@pytest.mark.parametrize("faults", [{}, {"stops_with_space": True}])
def test_a_stop_string_cuts_the_text_and_stays_in_the_ids_however_it_is_spelled(ask, faults):
    [done] = ask("say one two three", faults=faults, sampling=SamplingParams(stop="two"))
    assert ended(done) == ("one ", len("one two"), "stop")


def test_the_first_of_several_stop_strings_ends_it(ask):
    faults = {"stops_with_space": True}
    [done] = ask("say one two three", faults=faults, sampling=SamplingParams(stop=("three", "e t", "two")))
    assert ended(done) == ("on", len("one t"), "stop")


def test_a_stop_string_that_is_found_only_in_what_ran_on_makes_length_a_stop(ask):
    faults = {"stops_with_space": True}
    [done] = ask("say one two three", faults=faults, sampling=SamplingParams(stop="two", max_tokens=9))
    assert ended(done) == ("one ", len("one two"), "stop")


def test_a_stop_token_is_counted_and_not_said(ask):
    comma = 11  # in the byte alphabet
    [done] = ask("say a,b", sampling=SamplingParams(stop_token_ids=(comma,)))
    assert ended(done) == ("a", 2, "stop") and done.outputs[0].token_ids[-1] == comma


def test_every_eos_of_the_model_ends_it(ask):
    [done] = ask([*b"R@X", 220, 71, 257, 72], sampling=SamplingParams())
    assert done.error is None
    [done] = ask([82, 64, 88, 220, 71, 257, 72])
    assert ended(done)[2] == "stop"


@pytest.mark.parametrize("strip", [False, True])
def test_the_final_eos_is_counted_whether_the_sampler_gives_it_back_or_not(ask, strip):
    [done] = ask("say ab", faults={"strip_end": strip})
    assert ended(done) == ("ab", 3, "stop") and done.outputs[0].token_ids[-1] == 256


def test_eos_can_be_ignored_and_stops_still_stop(ask):
    [done] = ask("say ab", sampling=SamplingParams(ignore_eos=True, max_tokens=20))
    assert done.outputs[0].finish_reason == "length" and done.outputs[0].text.startswith("ab and on")
    [done] = ask("say ab", sampling=SamplingParams(ignore_eos=True, stop="on"))
    assert ended(done) == ("ab and ", len("ab and on"), "stop")


def test_a_control_token_may_be_a_stop_string(ask):
    [done] = ask("say ab", sampling=SamplingParams(stop="<eos>"))
    assert ended(done)[0] == "ab" and ended(done)[2] == "stop"


def test_a_schema_guides_every_completion(ask):
    schema = '{"type": "object"}'
    seen = []
    done = ask("say x", "y", engine__tensorrt__guided_json=schema, look=lambda b: seen.append(b._llm.args))
    assert texts(done) == ['{"answer": "ok"}'] * 2
    assert seen[0].guided_decoding_backend == "xgrammar"


# ---- opening


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Only 1 GPUs are available, but 4 are required.", "engine.tp × engine.pp needs 4 GPUs, here are 1"),
        ("tp_size 2 is not consistent with the engine's tp_size 4", "set engine.tp = 4"),
        (
            "expecting incompatible device, expecting compute 8.0 got compute 8.9",
            "compute capability 8.0, this one has 8.9",
        ),
        ("Version tag does not match.", "another version of TensorRT"),
        ("LLM got invalid argument: sampler_kind", "tensorrt_llm 1.2.1 does not know the argument sampler_kind"),
        ("All nodes which are allocated for this job are already filled.", "as many tasks as engine.tp × engine.pp"),
        ("CUDA out of memory. Tried to allocate", "lower engine.tensorrt.kv_cache_fraction"),
        ("libcuda.so.1: cannot open shared object file", "libcuda is not installed"),
    ],
)
def test_what_it_says_when_it_cannot_load_becomes_a_line_to_act_on(tmp_path, model, put, said, told):
    put("1.2.1", load=f"raise: {said}")
    with pytest.raises(ModelError) as caught:
        TensorRTBackend.open(make_job(tmp_path, model), progress=False)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_known_is_told_as_it_is(tmp_path, model, put):
    put("1.2.1", load="raise: something else\nin two lines")
    with pytest.raises(EngineError, match="tensorrt_llm 1.2.1 cannot load .*RuntimeError: something else in two lines"):
        TensorRTBackend.open(make_job(tmp_path, model), progress=False)


def test_too_few_gpus_are_told(tmp_path, model, put):
    put("1.2.1", gpus=1)
    with pytest.raises(ModelError, match="needs 4 GPUs, here are 1"):
        TensorRTBackend.open(make_job(tmp_path, model, engine__tp=2, engine__pp=2), progress=False)


def test_only_hugging_face_folders_are_loaded(tmp_path, put):
    put("1.2.1")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for name, wanted in {"m.gguf": "is a GGUF file", "nowhere": "no model at"}.items():
        with pytest.raises(JobError, match=wanted):
            TensorRTBackend.open(make_job(tmp_path, tmp_path / name), progress=False)


def test_the_fingerprint_is_what_decides_tokens(tmp_path, model, put):
    def of(version="1.2.1", **changes):
        put(version)
        backend = TensorRTBackend.open(make_job(tmp_path, model, **changes), progress=False)
        backend.close()
        return backend.fingerprint

    assert of(engine__profile__batch_size=3, engine__tensorrt__recycle_rows=5) == of()
    assert of("1.1.0") != of() and of(build__kv_dtype="fp8") != of()
    assert of(engine__tensorrt__guided_json='{"type": "object"}') != of()
    assert of(engine__tensorrt__guided_json='{"a": 1, "b": 2}') == of(engine__tensorrt__guided_json='{"b":2,"a":1}')
