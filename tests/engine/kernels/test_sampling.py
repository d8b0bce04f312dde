"""Sampling: the reference against Hugging Face's filters, the fast kernel against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batchinfer.engine.kernels import sampling, select
from tests.engine.kernels.batches import sampling_batch
from tests.engine.kernels.conftest import FAST, INTERPRETED, gpu_kernels

POINTS = 4000  # draws that show which tokens a row can give


def draws(sample, row, **filters):
    """Tokens of one row at many positions, so at many uniform numbers."""
    batch = sampling_batch(POINTS, position=np.arange(POINTS), seed=7, **filters)
    return sample(row.expand(POINTS, -1), batch).cpu().numpy()


def hugging_face(row, history=(), **filters):
    """Probabilities after Hugging Face's own processors, in generate's order."""
    from transformers.generation import logits_process as hf

    scores, ids = row[None].float(), torch.tensor([list(history)], dtype=torch.long)
    penalty, temperature = filters.get("repetition_penalty", 1.0), filters.get("temperature", 1.0)
    chain = [hf.RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
    chain += [hf.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    chain += [hf.TopKLogitsWarper(filters["top_k"])] if filters.get("top_k") else []
    chain += [hf.TopPLogitsWarper(filters["top_p"])] if filters.get("top_p", 1.0) < 1 else []
    chain += [hf.MinPLogitsWarper(filters["min_p"])] if filters.get("min_p") else []
    for processor in chain:
        scores = processor(ids, scores)
    return scores[0].softmax(dim=-1).cpu().numpy()


@pytest.fixture(params=["reference", *FAST])
def sample(request):
    if request.param == "reference":
        yield sampling.sample
        return
    kernels = gpu_kernels() if request.param == "gpu" else select(torch.device("cpu"), torch.float32)
    if kernels.name != request.param:
        pytest.skip("the CPU kernels cannot be built here")
    with torch.device("cuda" if request.param == "gpu" and not INTERPRETED else "cpu"):
        yield kernels.sample


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 12, "repetition_penalty": 1.7},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_tokens_are_distributed_as_hugging_faces(sample, filters):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    row = torch.randn(60, generator=generator) * 2
    history = np.array([[0] * 9, [3, 5, 5, 11, 40, 59, 3, 1, 1]], np.int32)
    used = history[1, :7] if "repetition_penalty" in filters else ()
    expected = hugging_face(row, used, **filters)
    got = np.bincount(draws(sample, row, history=history, history_rows=1, history_lens=7, **filters), minlength=60)
    assert not got[expected == 0].any()
    spread = np.sqrt(expected * (1 - expected) / POINTS)
    assert (np.abs(got / POINTS - expected) <= 5 * spread + 1e-3).all()


def kept_cdf(row, batch):
    """The reference's CDF of one row in float64, and its uniform number."""
    seen = {}
    original = torch.Tensor.cumsum

    def spy(self, *args, **kwargs):
        seen["cdf"] = original(self, *args, **kwargs)
        return seen["cdf"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cumsum", spy)
        sampling.sample(row[None], batch)
    return seen["cdf"][0] / seen["cdf"][0, -1], float(sampling.uniform(batch.seed, batch.index, batch.position)[0])


def one_row(batch, row):
    columns = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    rest = {name: columns.pop(name) for name in ("history", "all_greedy")}
    return sampling.SamplingBatch(**{name: column[row : row + 1] for name, column in columns.items()}, **rest)


@pytest.mark.parametrize("vocabulary", [1, 5, 16, 1000, 4099, 49152])
@pytest.mark.parametrize("scale", [0.01, 3, 20])
def test_fast_tokens_are_the_references(kernels, dtype, vocabulary, scale):
    rng = np.random.default_rng(vocabulary)
    torch.manual_seed(vocabulary)
    rows = 48 if vocabulary < 10000 else 12
    padded = torch.full((rows, vocabulary + 13), float("nan"), dtype=dtype)
    logits = padded[:, :vocabulary].copy_(torch.randn(rows, vocabulary) * scale)
    logits[3, : vocabulary // 2] = -torch.inf
    logits[4, : vocabulary // 3] = float("nan")
    batch = sampling_batch(
        rows,
        temperature=rng.choice([0, 0.2, 1, 3], rows, p=[0.1, 0.3, 0.3, 0.3]),
        top_k=rng.choice([0, 1, 7, 50, 3000, 2**31 - 1], rows),
        top_p=rng.choice([1, 0.999, 0.9, 0.5, 1e-6], rows),
        min_p=rng.choice([0, 0.02, 0.5, 1], rows, p=[0.7, 0.1, 0.1, 0.1]),
        repetition_penalty=rng.choice([1, 1.3, 0.7], rows),
        seed=rng.integers(-(2**63), 2**63 - 1, rows),
        index=rng.integers(0, 128, rows),
        position=rng.integers(0, 2**31, rows),
        history=rng.integers(0, vocabulary, (5, 64), dtype=np.int32),
        history_rows=rng.integers(0, 5, rows),
        history_lens=rng.integers(0, 65, rows),
    )
    fast, reference = kernels.sample(logits, batch), sampling.sample(logits, batch)
    assert fast.dtype == reference.dtype == torch.int32
    for row in np.flatnonzero((fast != reference).cpu().numpy()):  # only where rounding may decide
        cdf, u = kept_cdf(logits[row], one_row(batch, row))
        token = int(fast[row])
        low = float(cdf[token - 1]) if token else 0.0
        assert low - 1e-5 <= u <= float(cdf[token]) + 1e-5, (row, token, int(reference[row]))


def test_the_draw_is_a_function_of_the_row_alone(sample):
    logits = torch.randn(8, 500)
    columns = {"temperature": 1.0, "top_p": 0.9, "seed": np.arange(8), "index": np.arange(8) % 3, "position": 5}
    together = sample(logits, sampling_batch(8, **columns))
    for row in range(8):
        alone = {name: values[row] if isinstance(values, np.ndarray) else values for name, values in columns.items()}
        assert sample(logits[row : row + 1], sampling_batch(1, **alone))[0] == together[row]
    for change in ({"seed": 1}, {"index": 1}, {"position": 1}):
        flat = sample(torch.zeros(1, 10000), sampling_batch(1, temperature=1.0))
        assert sample(torch.zeros(1, 10000), sampling_batch(1, temperature=1.0, **change))[0] != flat[0]


def test_greedy_takes_the_highest_and_the_lowest_id_of_equals(dtype, sample):
    for vocabulary in (1, 3, 17, 1024, 5000):
        logits = torch.randn(6, vocabulary + 3).to(dtype)[:, :vocabulary]
        best = logits.float().max(dim=-1, keepdim=True).values
        expected = (logits.float() == best).int().argmax(dim=-1).int()
        assert torch.equal(sample(logits, sampling_batch(6)), expected)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_without_logits_gives_minus_one(dtype, sample, temperature):
    logits = torch.zeros(5, 100, dtype=dtype)
    logits[1], logits[2] = float("nan"), -torch.inf
    logits[3, :99] = float("nan")
    logits[4, 42] = torch.inf
    tokens = sample(logits, sampling_batch(5, temperature=temperature, top_p=0.9)).tolist()
    assert tokens[1:] == [-1, -1, 99, 42] and 0 <= tokens[0] < 100


def test_ties_stay_at_top_k_and_go_by_id_at_top_p(sample):
    row = torch.tensor([1.0, 3.0, 1.0, 3.0, 3.0, 0.0])
    assert set(draws(sample, row, temperature=1.0, top_k=2)) == {1, 3, 4}
    assert set(draws(sample, row, temperature=1.0, top_k=3, top_p=0.5)) == {1, 3}


def test_extreme_temperatures_and_probabilities(sample):
    row = torch.tensor([0.0, 1e30, 1e30, -1e30])
    assert set(draws(sample, row, temperature=1e-6)) == {1, 2}
    assert set(draws(sample, row, temperature=100.0, top_p=1e-7)) == {1}
    assert set(draws(sample, row, temperature=1.0, top_p=1e-46)) == {1}  # no float32
