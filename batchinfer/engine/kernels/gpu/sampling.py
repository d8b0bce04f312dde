"""Sampling in Triton: one program a row, no probabilities in memory.

Instead of sorting the vocabulary, thresholds are searched by halving the interval of possible logits, which a
float32's bits make an interval of integers: at most 32 passes over a row that lies in the L2 cache.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.engine.kernels.sampling import SamplingBatch, penalise, uniform

_BLOCK = 4096


@triton.jit
def _row_logits(logits, block, vocabulary, BLOCK: tl.constexpr):
    """Logits of a block; NaN, and what lies past the end, as -inf."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    return ids, tl.where(x == x, x, float("-inf"))


@triton.jit
def _key(x):
    """Integers ordered as the floats are; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _greedy(logits, vocabulary, BLOCK: tl.constexpr):
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for block in range(tl.cdiv(vocabulary, BLOCK)):
        ids, x = _row_logits(logits, block, vocabulary, BLOCK)
        better = x > best
        best = tl.where(better, x, best)
        place = tl.where(better, ids, place)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, place, 0x7FFFFFFF), 0)


@triton.jit
def _argmax(logits, stride, vocabulary, tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, token = _greedy(logits + row * stride, vocabulary, BLOCK)
    tl.store(tokens + row, tl.where(top == float("-inf"), -1, token))


@triton.jit
def _draw(logits, stride, vocabulary, temperatures, top_ks, top_ps, min_ps, uniforms, tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top, token = _greedy(logits, vocabulary, BLOCK)
    temperature = tl.load(temperatures + row)
    if top == float("-inf"):
        token = -1
    elif temperature > 0 and top < float("inf"):
        token = _inverse_cdf(
            logits, vocabulary, top, temperature, tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row),
            tl.load(uniforms + row), BLOCK,
        )  # fmt: skip
    tl.store(tokens + row, token)


@triton.jit
def _inverse_cdf(logits, vocabulary, top, temperature, top_k, top_p, min_p, uniform, BLOCK: tl.constexpr):
    """The draw of the contract. Kept are ids whose key is over ``edge``, and the first ``ties`` of those at it."""
    lowest = _key(float("-inf") + top * 0)
    highest = _key(top)
    blocks = tl.cdiv(vocabulary, BLOCK)

    edge = lowest
    if top_k > 0 and top_k < vocabulary:  # the highest key that at least top_k reach
        low, high = lowest.to(tl.int64), highest.to(tl.int64)
        while low < high:
            middle = (low + high + 1) >> 1
            reach = 0
            for block in range(blocks):
                _, x = _row_logits(logits, block, vocabulary, BLOCK)
                reach += tl.sum((_key(x) >= middle).to(tl.int32), 0)
            if reach >= top_k:
                low = middle
            else:
                high = middle - 1
        edge = low.to(tl.int32)
    ties = vocabulary
    if top_p < 1:  # the highest key whose reach weighs top_p of the whole
        whole = _weight_from(logits, vocabulary, top, temperature, edge.to(tl.int64), BLOCK)
        wanted = top_p.to(tl.float64) * whole
        low, high = edge.to(tl.int64), highest.to(tl.int64)
        while low < high:
            middle = (low + high + 1) >> 1
            if _weight_from(logits, vocabulary, top, temperature, middle, BLOCK) >= wanted:
                low = middle
            else:
                high = middle - 1
        edge = low.to(tl.int32)
        above = _weight_from(logits, vocabulary, top, temperature, low + 1, BLOCK)
        bits = edge ^ ((edge >> 31) & 0x7FFFFFFF)
        each = tl.exp((bits.to(tl.float32, bitcast=True) - top) / temperature).to(tl.float64)
        share = tl.where(each > 0, (wanted - above) / tl.where(each > 0, each, 1.0), 1.0)
        ties = tl.minimum(tl.maximum(tl.ceil(share), 1.0), vocabulary).to(tl.int32)

    kept = uniform * 0
    seen = 0
    for block in range(blocks):
        _, weight, seen = _kept(logits, block, vocabulary, top, temperature, edge, ties, seen, min_p, BLOCK)
        kept += tl.sum(weight, 0)
    target = uniform * kept
    before = uniform * 0
    seen = 0
    token, last = vocabulary, 0
    for block in range(blocks):
        ids, weight, seen = _kept(logits, block, vocabulary, top, temperature, edge, ties, seen, min_p, BLOCK)
        reached = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
        token = tl.minimum(token, tl.min(tl.where(reached, ids, vocabulary), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, ids, 0), 0))
        before += tl.sum(weight, 0)
    return tl.minimum(token, last)  # rounding may carry the target onto the total


@triton.jit
def _kept(logits, block, vocabulary, top, temperature, edge, ties, seen, min_p, BLOCK: tl.constexpr):
    """Ids of a block, their weights (0 where not kept), and how many ids at the edge there were so far."""
    ids, x = _row_logits(logits, block, vocabulary, BLOCK)
    key = _key(x)
    tied = (key == edge).to(tl.int32)
    rank = seen + tl.cumsum(tied, 0)
    weight = tl.exp((x - top) / temperature)
    keep = ((key > edge) | ((tied > 0) & (rank <= ties))) & (weight >= min_p)
    return ids, tl.where(keep, weight, 0.0).to(tl.float64), seen + tl.sum(tied, 0)


@triton.jit
def _weight_from(logits, vocabulary, top, temperature, edge, BLOCK: tl.constexpr):
    """Weight of all ids whose key is at least ``edge``."""
    weight = tl.zeros([BLOCK], tl.float64)
    for block in range(tl.cdiv(vocabulary, BLOCK)):
        _, x = _row_logits(logits, block, vocabulary, BLOCK)
        weight += tl.where(_key(x) >= edge, tl.exp((x - top) / temperature), 0.0).to(tl.float64)
    return tl.sum(weight, 0)


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    assert logits.stride(1) == 1
    rows, vocabulary = logits.shape
    if batch.all_greedy:
        return argmax(logits)
    if (batch.repetition_penalty != 1).any():
        logits = penalise(logits.to(torch.float32, copy=True), batch)
    uniforms = uniform(batch.seed, batch.index, batch.position)
    columns = [batch.temperature, batch.top_k, batch.top_p, batch.min_p, uniforms]
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _draw[(rows,)](
        logits, logits.stride(0), vocabulary, *(_upload(column, logits.device) for column in columns), tokens,
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return tokens


def argmax(logits: Tensor) -> Tensor:
    """The greedy choice alone, int32 ``[rows]``; -1 where there is none."""
    tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    _argmax[(len(logits),)](logits, logits.stride(0), logits.shape[1], tokens, BLOCK=_BLOCK, num_warps=8)
    return tokens


def _upload(column: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(column).to(device, non_blocking=True)  # few bytes, so the driver takes them along
