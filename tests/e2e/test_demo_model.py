"""The demo model, a real one: our tokens are transformers' tokens."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from batchinfer import Engine, SamplingParams
from batchinfer.data.prompt import PromptRenderer
from batchinfer.engine.model.source import ModelSource
from batchinfer.job import PromptSection, SamplingSection
from tests.conftest import DEMO_MODEL

PROMPTS, LONG, NEW_TOKENS = 64, 4, 24

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def reference():
    """transformers' own model, read from the GGUF file by transformers' own reader."""
    from transformers import AutoModelForCausalLM

    source = ModelSource.resolve(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(source.folder, gguf_file=source.gguf.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def engine():
    return Engine(DEMO_MODEL, dtype="float32", batch_size=24, step_tokens=192)


@pytest.fixture(scope="module")
def prompts(engine) -> list[list[int]]:
    """Sample prompts through the chat template: the shortest, and a few of some 250 tokens."""
    rows = pq.read_table("sample_data/prompts.parquet", columns=["prompt"])
    renderer = PromptRenderer(
        PromptSection(template="{{ prompt }}", chat="on"), SamplingSection(), engine.plan.tokenizer_dir, 8192
    )
    requests = renderer.render(rows, range(len(rows)), range(len(rows)))
    by_length = sorted((list(request.prompt_token_ids) for request in requests), key=len)
    return by_length[: PROMPTS - LONG] + by_length[len(by_length) * 2 // 3 :][:LONG]


def choices(model, prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """What transformers finds most likely after each prompt and after each token of its answer but the last.

    Where all of them are the answer's own, it is what transformers' greedy ``generate`` would have answered.
    """
    rows = [torch.tensor(prompt + answer[:-1]) for prompt, answer in zip(prompts, answers)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # at the right end, where nobody looks
    with torch.inference_mode():
        states = model.model(ids).last_hidden_state
        seen = [state[len(p) - 1 :][: len(a)] for state, p, a in zip(states, prompts, answers)]
        return [model.lm_head(states).argmax(-1).tolist() for states in seen]


def test_greedy_tokens_equal_transformers_for_64_sample_prompts(engine, reference, prompts):
    assert len(prompts) == PROMPTS
    (eos,) = engine.plan.eos_token_ids
    ours = {
        c.key: list(c.outputs[0].token_ids) for c in engine.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS))
    }
    assert engine.counters.steps > NEW_TOKENS  # rows joined and left while others ran
    groups = [*np.array_split(np.arange(PROMPTS - LONG), 4), np.arange(PROMPTS - LONG, PROMPTS)]  # of like length
    for group in groups:
        answers = [ours[i] for i in group]
        assert choices(reference, [prompts[i] for i in group], answers) == answers
    for answer in ours.values():
        assert answer[-1] == eos or len(answer) == NEW_TOKENS
        assert eos not in answer[:-1]


def test_a_row_gets_the_same_tokens_alone_and_in_a_batch_of_64(engine, prompts):
    sampled = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=3)
    shorter = [prompt[-(16 + i) :] for i, prompt in enumerate(prompts[:-LONG])] + prompts[-LONG:]
    together = {c.key: c.outputs[0].token_ids for c in engine.generate(shorter, sampled)}
    for i in (*range(0, PROMPTS, 8), PROMPTS - 1):
        (alone,) = engine.generate([shorter[i]], sampled)
        assert alone.outputs[0].token_ids == together[i]


def test_it_knows_the_capital_of_france(engine):
    (completion,) = engine.generate(["The capital of France is"], SamplingParams(max_tokens=4))
    assert completion.outputs[0].text.startswith(" Paris")
