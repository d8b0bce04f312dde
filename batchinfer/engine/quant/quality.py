"""Quality: what quantisation did to a model, on rows that no calibration saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.kernels.linear import Linear
from batchinfer.engine.quant.calibration import Walk

CHUNK_ROWS = 256  # of logits held at a time
PASSAGE = 32  # neighbouring tokens, which are alike: those of a passage count as one measurement


@dataclass(frozen=True)
class Quality:
    tokens: int  # predicted, the first of each row is not
    perplexity: float  # of the quantised model
    reference_perplexity: float  # of the model in the engine's dtype
    agreement: float  # share of tokens where both find the same one likeliest
    standard_error: float  # of ``loss``, for being measured with so many tokens and no more

    @property
    def loss(self) -> float:
        """How much perplexity grew, as a fraction."""
        return self.perplexity / self.reference_perplexity - 1

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f}, unquantised {self.reference_perplexity:.3f} "
            f"({self.loss:+.2%} ± {self.standard_error:.2%}); "
            f"greedy agreement {self.agreement:.1%} of {self.tokens:,} held-out tokens"
        )


@torch.inference_mode()
def measure(quantised: Walk, reference: Walk, norm: Tensor, head: Linear, rows: Sequence[Sequence[int]]) -> Quality:
    """Compare two walks over ``rows`` that have come to the end of their models.

    What rows begin with alike counts once: a job's prompts may have a system prompt in common, and be short beside it.
    """
    ids = torch.tensor([token for row in rows for token in row])
    last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    predicts = _is_new(rows).roll(-1)
    predicts[last] = False
    following = ids.roll(-1)
    passages = [len(row[first : first + PASSAGE]) for row in rows for first in range(0, len(row), PASSAGE)]
    passage_of = torch.repeat_interleave(torch.tensor(passages))
    surprise, agreed, count, first = torch.zeros(2, dtype=torch.double), 0, 0, 0
    differences = []  # how much more a token surprises one than the other
    for states in zip(quantised.normed(norm), reference.normed(norm), strict=True):
        chosen = predicts[first : first + len(states[0])]
        wanted = following[first : first + len(states[0])][chosen].to(norm.device)
        first += len(states[0])
        kept = [state[chosen.to(norm.device)] for state in states]
        for part in range(0, len(wanted), CHUNK_ROWS):
            now = slice(part, part + CHUNK_ROWS)
            logits = [head(state[now]).float() for state in kept]
            each = torch.stack([F.cross_entropy(values, wanted[now], reduction="none") for values in logits]).double()
            surprise += each.sum(1).cpu()
            differences.append((each[0] - each[1]).cpu())
            agreed += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        count += len(wanted)
    means = (surprise / count).tolist()
    perplexity, reference_perplexity = (math.exp(min(mean, 700)) for mean in means)
    spread = _standard_error(torch.cat(differences), passage_of[predicts])
    return Quality(count, perplexity, reference_perplexity, agreed / count, perplexity / reference_perplexity * spread)


def _is_new(rows: Sequence[Sequence[int]]) -> Tensor:
    """Bool ``[tokens]``: no row before begins with all that the token ends."""
    seen: set[int] = set()
    new = []
    for row in rows:
        beginning = 0
        for token in row:
            beginning = hash((beginning, token))
            new.append(beginning not in seen)
            seen.add(beginning)
    return torch.tensor(new)


def _standard_error(values: Tensor, passage_of: Tensor) -> float:
    """Of the mean of ``values [tokens]``, where passages are independent of each other; of one alone, its tokens."""
    passages, passage_of = passage_of.unique(return_inverse=True)
    if len(passages) == 1:
        passages, passage_of = values, torch.arange(len(values))
    off = torch.zeros(len(passages), dtype=values.dtype).index_add_(0, passage_of, values - values.mean())
    return math.sqrt(float(off.square().sum()) * len(off) / max(len(off) - 1, 1)) / len(values)
