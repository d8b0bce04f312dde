"""Every family of models gives transformers' own greedy tokens, in fp32, whatever shares its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from batchinfer import Engine, SamplingParams
from tests.engine.tiny import DEVICES, EOS, VARIANTS, make_model

GREEDY = SamplingParams(max_tokens=40)

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


def prompts(count: int = 24, longest: int = 150, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 256, 40).tolist()
    tails = [rng.integers(0, 256, rng.integers(1, longest - 40)).tolist() for _ in range(count)]
    return [shared + tail if i % 3 == 0 else tail for i, tail in enumerate(tails)]


def expected(model, token_ids: list[int], max_tokens: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    return out[0, len(token_ids) :].tolist()


def test_greedy_tokens_equal_transformers_token_for_token(model, device):
    engine = Engine(model, dtype="float32", device=device, batch_size=7, step_tokens=64)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = prompts()
    got = {c.key: list(c.outputs[0].token_ids) for c in engine.generate(ids, GREEDY)}
    assert [got[i] for i in range(len(ids))] == [expected(reference, p, GREEDY.max_tokens) for p in ids]
    assert engine.pages.held == 0
    assert engine.counters.steps > 1


def test_a_page_pool_too_small_for_the_batch_changes_no_token(model, device):
    """Rows are preempted and computed again; the tokens stay."""
    ids = prompts()
    roomy = Engine(model, dtype="float32", device=device, batch_size=12, step_tokens=96, seq_len=256)
    wanted = {c.key: c.outputs[0].token_ids for c in roomy.generate(ids, GREEDY)}
    page_gib = roomy.stage.decoder.attention.page_bytes(roomy.plan.spec.num_layers) / 2**30
    tight = Engine(roomy.plan, kv_cache_gib=page_gib * (256 / roomy.stage.page_size + 2.5), prefix_sharing=False)
    tight.scheduler._used_share = 0.01  # admission that expects short outputs, so that it is wrong
    assert {c.key: c.outputs[0].token_ids for c in tight.generate(ids, GREEDY)} == wanted
    assert tight.scheduler.preemptions > 0
    assert tight.pages.held == 0
