"""The demo model, a real one: our tokens are transformers' tokens."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch

from batchinfer import Engine, SamplingParams
from batchinfer.data.prompt import PromptRenderer
from batchinfer.engine.model.source import ModelSource
from batchinfer.job import PromptSection, SamplingSection
from tests.conftest import DEMO_MODEL

PROMPTS, NEW_TOKENS = 64, 64

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
    """The sample prompts of moderate length, through the chat template."""
    rows = pq.read_table("sample_data/prompts.parquet", columns=["prompt"])
    renderer = PromptRenderer(
        PromptSection(template="{{ prompt }}", chat="on"), SamplingSection(), engine.plan.tokenizer_dir, 8192
    )
    requests = renderer.render(rows, range(len(rows)), range(len(rows)))
    moderate = [list(request.prompt_token_ids) for request in requests if len(request.prompt_token_ids) <= 256]
    return moderate[:PROMPTS]


def generate(model, batch: list[list[int]], eos: int) -> list[list[int]]:
    """transformers' greedy ``generate`` on a left-padded batch, each row cut after its EOS."""
    width = max(map(len, batch))
    ids = torch.tensor([[eos] * (width - len(row)) + row for row in batch])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    rows = out[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def test_greedy_tokens_equal_transformers_for_64_sample_prompts(engine, reference, prompts):
    assert len(prompts) == PROMPTS
    (eos,) = engine.plan.eos_token_ids
    ours = {
        c.key: list(c.outputs[0].token_ids) for c in engine.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS))
    }
    by_length = sorted(range(PROMPTS), key=lambda i: len(prompts[i]))
    for first in range(0, PROMPTS, 16):
        group = by_length[first : first + 16]
        expected = generate(reference, [prompts[i] for i in group], eos)
        assert [ours[i] for i in group] == expected
    assert engine.counters.steps > NEW_TOKENS  # rows joined and left while others ran


def test_a_row_gets_the_same_tokens_alone_and_in_a_batch_of_64(engine, prompts):
    sampled = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=3)
    together = {c.key: c.outputs[0].token_ids for c in engine.generate(prompts, sampled)}
    for i in range(0, PROMPTS, 8):
        (alone,) = engine.generate([prompts[i]], sampled)
        assert alone.outputs[0].token_ids == together[i]


def test_it_knows_the_capital_of_france(engine):
    (completion,) = engine.generate(["The capital of France is"], SamplingParams(max_tokens=4))
    assert completion.outputs[0].text.startswith(" Paris")
