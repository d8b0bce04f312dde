"""Quality: what quantisation did to a model, on rows that no calibration saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.engine.kernels.linear import Linear
from batchinfer.engine.quant.calibration import Walk

CHUNK_ROWS = 256  # of logits held at a time


@dataclass(frozen=True)
class Quality:
    tokens: int  # predicted, the first of each row is not
    perplexity: float  # of the quantised model
    reference_perplexity: float  # of the model in the engine's dtype
    agreement: float  # share of tokens where both find the same one likeliest

    @property
    def loss(self) -> float:
        """How much perplexity grew, as a fraction."""
        return self.perplexity / self.reference_perplexity - 1

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f}, unquantised {self.reference_perplexity:.3f} ({self.loss:+.2%}); "
            f"greedy agreement {self.agreement:.1%} of {self.tokens:,} held-out tokens"
        )


@torch.inference_mode()
def measure(quantised: Walk, reference: Walk, norm: Tensor, head: Linear, rows: Sequence[Sequence[int]]) -> Quality:
    """Compare two walks over ``rows`` that have come to the end of their models."""
    ids = torch.tensor([token for row in rows for token in row])
    last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    predicts = torch.ones(len(ids), dtype=torch.bool)
    predicts[last] = False
    following = ids.roll(-1)
    surprise, agreed, count, first = [0.0, 0.0], 0, 0, 0
    for states in zip(quantised.normed(norm), reference.normed(norm), strict=True):
        chosen = predicts[first : first + len(states[0])]
        wanted = following[first : first + len(states[0])][chosen].to(norm.device)
        first += len(states[0])
        kept = [state[chosen.to(norm.device)] for state in states]
        for part in range(0, len(wanted), CHUNK_ROWS):
            now = slice(part, part + CHUNK_ROWS)
            logits = [head(state[now]).float() for state in kept]
            for side, values in enumerate(logits):
                surprise[side] += float(torch.nn.functional.cross_entropy(values, wanted[now], reduction="sum"))
            agreed += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        count += len(wanted)
    perplexity, reference_perplexity = (math.exp(min(total / count, 700)) for total in surprise)
    return Quality(count, perplexity, reference_perplexity, agreed / count)
