"""The next token of each row: filters, then one draw that depends on the row alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class SamplingBatch:
    """How each of ``rows`` is to be sampled. All arrays are C-contiguous numpy on the host, one entry a row.

    ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 are off; ``temperature`` 0 is greedy.
    """

    temperature: np.ndarray  # float32
    top_k: np.ndarray  # int32
    top_p: np.ndarray  # float32
    min_p: np.ndarray  # float32
    repetition_penalty: np.ndarray  # float32
    seed: np.ndarray  # int64 (or uint64: the same bits give the same draw)
    index: np.ndarray  # int32, which of the n completions
    position: np.ndarray  # int64, position of the token being chosen
    history: np.ndarray  # int32 [num_slots, max_len], prompt and completion so far
    history_rows: np.ndarray  # int32, row of `history`; read only where repetition_penalty is not 1, as are the lengths
    history_lens: np.ndarray  # int32
    all_greedy: bool  # every temperature is 0 and every repetition_penalty is 1: argmax, nothing else is read

    @classmethod
    def greedy(cls, rows: int) -> SamplingBatch:
        integers = dict.fromkeys(
            ("seed", "index", "position", "history_rows", "history_lens"), np.zeros(rows, np.int32)
        )
        off = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        floats = dict.fromkeys(off, np.zeros(rows, np.float32))
        return cls(**integers, **floats, history=np.zeros((rows, 1), np.int32), all_greedy=True)


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Choose a token for each row of ``logits [rows, vocabulary]`` (the row stride may be larger), int32 ``[rows]``.

    Filters follow Hugging Face's, in its order: repetition penalty (positive logits divided, negative multiplied),
    temperature, top-k (ties at the threshold stay), top-p (the smallest set that reaches p, at least one token; of
    equal logits the lower id comes first), min-p. The draw is the inverse CDF in token-id order of what is kept, at
    ``uniform(seed, index, position)``. Greedy takes the highest logit, of equal ones the lowest id. A NaN logit counts
    as -inf; a row without any logit above -inf gives -1; a logit of +inf wins outright.
    """
    x = logits.float()
    x = torch.where(x.isnan(), -torch.inf, x)
    if not batch.all_greedy:
        x = penalise(x, batch)
    top, token = x.max(dim=-1)
    if not batch.all_greedy:
        drawn = (torch.from_numpy(batch.temperature).to(x.device) > 0) & top.isfinite()
        token = torch.where(drawn, _draw(x, top, batch), token)
    return torch.where(top == -torch.inf, -1, token).int()


def uniform(seed: np.ndarray, index: np.ndarray, position: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) with 53 random bits, a pure function of the three: a chain of SplitMix64 steps."""
    with np.errstate(over="ignore"):
        bits = _splitmix64(seed.astype(np.uint64))
        bits = _splitmix64(bits ^ index.astype(np.uint64))
        bits = _splitmix64(bits ^ position.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def penalise(x: Tensor, batch: SamplingBatch) -> Tensor:
    """Repetition penalties applied to float32 logits, in place."""
    rows = np.flatnonzero(batch.repetition_penalty != 1)
    if not len(rows):
        return x
    vocabulary = x.shape[1]
    longest = max(1, int(batch.history_lens[rows].max()))
    tokens = batch.history[batch.history_rows[rows], :longest].astype(np.int64)
    tokens[np.arange(longest) >= batch.history_lens[rows, None]] = vocabulary  # one column to throw away
    seen = torch.zeros(len(rows), vocabulary + 1, dtype=torch.bool, device=x.device)
    seen = seen.scatter_(1, torch.from_numpy(tokens).to(x.device), True)[:, :vocabulary]
    penalty = torch.from_numpy(batch.repetition_penalty[rows, None]).to(x.device)
    where = torch.from_numpy(rows).to(x.device)
    old = x[where]
    x[where] = torch.where(seen, torch.where(old > 0, old / penalty, old * penalty), old)
    return x


def _draw(x: Tensor, top: Tensor, batch: SamplingBatch) -> Tensor:
    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x.device)[:, None]

    temperature, top_k, top_p = column(batch.temperature), column(batch.top_k).long(), column(batch.top_p)
    weight = ((x - top[:, None]) / temperature).double().exp_()  # of greedy rows: whatever, they are not used
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    vocabulary = x.shape[1]
    rank = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary) - 1
    weight = weight.masked_fill_(x < ordered.gather(1, rank), 0)

    by_rank = weight.gather(1, order)
    before = by_rank.cumsum(dim=-1) - by_rank
    enough = (before >= top_p * by_rank.sum(dim=-1, keepdim=True)) & (top_p < 1) & (before > 0)
    weight = weight.masked_fill_(torch.zeros_like(enough).scatter_(1, order, enough), 0)
    weight = weight.masked_fill_(weight < column(batch.min_p), 0)

    cdf = weight.cumsum(dim=-1)
    target = column(uniform(batch.seed, batch.index, batch.position)) * cdf[:, -1:]
    last = cdf.argmax(dim=-1)  # the first to reach the total: rounding may carry the target onto it
    return torch.minimum((cdf <= target).sum(dim=-1), last)
