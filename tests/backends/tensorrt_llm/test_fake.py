"""The fake does what tensorrt_llm is documented, or was seen, to do: without that the other tests prove nothing."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import closing

import numpy as np
import pytest


@pytest.fixture
def llm(put, model):
    """Opens the fake's own LLM."""
    opened = []

    def open_llm(version="1.2.1", faults=None, **arguments):
        put(version, **(faults or {}))
        from tensorrt_llm import LLM

        opened.append(LLM(str(model), **arguments))
        return opened[-1]

    yield open_llm
    for one in opened:
        one.shutdown()


def ids(llm, text):
    return llm.tokenizer.encode(text)


def blocks(call) -> bool:
    """Whether it has not returned after a moment."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(0.2)
    return thread.is_alive()


def test_a_second_result_after_an_error_blocks_for_ever_whatever_timeout_it_is_given(llm):
    engine = llm()
    future = engine.generate_async(ids(engine, "!refuse"))
    with pytest.raises(RuntimeError, match="refused"):
        future.result()
    assert not future.finished and blocks(lambda: future.result(timeout=0.01))


def test_generate_submits_everything_and_one_bad_prompt_ends_it(llm):
    engine = llm(faults={"compute_seconds": 0.05}, max_batch_size=2)
    prompts = [ids(engine, f"say {i}") for i in range(40)]
    with pytest.raises(RuntimeError, match="refused"):
        engine.generate([ids(engine, "!refuse"), *prompts])
    assert engine._executor.peak_pending > 20
    with pytest.raises(IndexError):  # no prompts are one empty prompt
        engine.generate([])


def test_numpy_ids_are_not_ints(llm):
    engine = llm()
    with pytest.raises(AssertionError):
        engine.generate_async(np.array([1, 2]))
    with pytest.raises(IndexError):
        engine.generate_async([])


def test_a_prompt_longer_than_a_step_needs_chunked_prefill(llm):
    with pytest.raises(ValueError, match="max_num_tokens"):
        (engine := llm(max_num_tokens=4)).generate_async(ids(engine, "longer"))
    assert (engine := llm(max_num_tokens=4, enable_chunked_prefill=True)).generate_async(ids(engine, "longer"))


def test_submitting_writes_into_the_parameters(llm):
    engine = llm("1.4.0rc1")
    from tensorrt_llm import SamplingParams

    params = SamplingParams(stop="END")
    engine.generate_async(ids(engine, "say x"), params).result()
    assert params.end_id == 256 and params._stop_word_ids == [ids(engine, "END")]
    with pytest.raises(RuntimeError, match="not processed by tokenizer"):
        engine.generate_async(ids(engine, "say x"), SamplingParams(stop="END", end_id=256)).result()


def test_what_is_greedy_depends_on_the_version(put):
    def greedy(version, **arguments):
        put(version)
        from tensorrt_llm import SamplingParams

        return SamplingParams(**arguments).greedy

    assert greedy("1.0.0", temperature=0.7) and not greedy("1.2.1", temperature=0.7)
    assert not greedy("1.0.0", temperature=0, top_p=0.9) and greedy("1.2.1", temperature=0, top_p=0.9)
    put("1.2.1")
    from tensorrt_llm import SamplingParams

    with pytest.raises(ValueError, match="Greedy"):
        SamplingParams(n=2)
    with pytest.raises(TypeError):
        SamplingParams(max_new_tokens=3)


def test_unknown_arguments_are_refused_and_some_are_known_to_one_version_alone(llm):
    with pytest.raises(ValueError, match="got invalid argument: batch_size"):
        llm(batch_size=3)
    with pytest.raises(ValueError, match="Extra inputs"):
        llm(kv_cache_config={"fraction": 0.5})
    with pytest.raises(ValueError, match="invalid argument: sampler_type"):
        llm("1.0.0", sampler_type="TorchSampler")
    with pytest.raises(ValueError, match="invalid argument: use_torch_sampler"):
        llm("1.2.1", use_torch_sampler=True)
    with pytest.raises(ValueError, match="TRTLLMSampler"):
        llm("1.3.0rc27", sampler_type="TRTLLMSampler")
    with pytest.raises(ValueError, match="specific to TensorRT backend"):
        llm("1.2.1", build_config=None)


def test_an_error_of_a_background_thread_is_met_by_whoever_comes_by_and_shuts_down(llm):
    engine = llm()

    async def ask():
        engine.generate_async(ids(engine, "!background"))
        await asyncio.sleep(0.05)
        with pytest.raises(ValueError, match="a background thread failed"):
            await engine.generate_async(ids(engine, "say innocent")).aresult()
        engine._executor._thread.join(5)  # it may still hand over what nobody waits for

    asyncio.run(ask())
    assert engine._executor.is_shutdown()
    with pytest.raises(RuntimeError, match="shutting down"):
        engine.generate_async(ids(engine, "say x"))


@pytest.mark.parametrize(("version", "dies"), [("1.2.1", False), ("1.4.0rc1", True)])
def test_late_versions_die_of_a_burst_of_errors(llm, version, dies):
    engine = llm(version)
    futures = [engine.generate_async(ids(engine, f"!refuse {i}")) for i in range(12)]
    seen = []
    for future in futures:
        try:
            future.result()
        except RuntimeError as error:
            seen.append(str(error))
    assert ("budget exhausted" in " ".join(seen)) is dies and engine._executor.is_shutdown() is dies


def test_a_closed_loop_breaks_the_thread_that_hands_results_over(llm):
    engine = llm(faults={"compute_seconds": 0.1})

    async def leave():
        engine.generate_async(ids(engine, "say x"))

    with closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(leave())
    hook, raised = threading.excepthook, queue.Queue()
    threading.excepthook = raised.put
    try:
        assert "closed" in str(raised.get(timeout=5).exc_value)
    finally:
        threading.excepthook = hook
    assert not engine._executor._thread.is_alive()


def test_memory_grows_with_every_request(llm):
    engine = llm()
    for _ in range(3):
        engine.generate_async(ids(engine, "say x")).result()
    assert len(engine._executor.leaked) == 3
