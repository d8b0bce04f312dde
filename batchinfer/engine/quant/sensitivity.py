"""Sensitivity: what it costs to keep a matrix in fewer bits, tried on one at a time to the end of the model.

A cost is how far the next tokens' probabilities move, as a Kullback-Leibler divergence. A loss of perplexity so small
would drown in the noise of a few hundred tokens; this is of second order in the error, so it does not, and those of
several matrices add up. All else is in float32: in bfloat16 the least change moves as much as a matrix in 8 bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchinfer.engine.kernels.linear import Linear
from batchinfer.engine.model.decoder import Layer
from batchinfer.engine.quant.calibration import LINEARS, Walk
from batchinfer.engine.quant.fold import Group

ROWS, ROW_TOKENS = 4, 64  # that matrices are tried on


@dataclass(frozen=True)
class Cost:
    divergence: float  # of the next token's probabilities, in nats
    weights: int  # that it would take to keep the matrix as it is


class Trials:
    """Walks through a model as it is, one for each matrix that has come by, in which that one alone is quantised."""

    def __init__(self, start: Walk) -> None:
        """
        Args:
            start: in float32, at the beginning of the model, with the rows to try them on.
        """
        self._whole = start
        self._tried: dict[str, Walk] = {}
        self._weights: dict[str, int] = {}

    def advance(self, name: str, group: Group, quantised: Group) -> None:
        """Move through a layer.

        Args:
            group: its tensors in float32.
            quantised: the same with its matrices in other forms.
        """
        rest = {part: tensor for part, tensor in group.items() if part.partition(".weight")[0] not in LINEARS}
        whole, tried = Layer.from_weights(group), Layer.from_weights(quantised | rest)
        for walk in self._tried.values():
            walk.advance(whole)
        for linear in LINEARS:
            walk = self._tried[f"{name}.{linear}"] = self._whole.branch()
            walk.advance(replace(whole, **{linear: getattr(tried, linear)}))
            self._weights[f"{name}.{linear}"] = group[f"{linear}.weight"].numel()
        self._whole.advance(whole)

    def costs(self, norm: Tensor, head: Linear) -> dict[str, Cost]:
        """Of each matrix, named as in ``layer-003.down``, once the last layer has come by; ``head`` is in float32."""
        whole = [head(state).log_softmax(-1) for state in self._whole.normed(norm)]

        def divergence(walk: Walk) -> float:
            each = [
                (likely.exp() * (likely - head(state).log_softmax(-1))).sum(-1)
                for likely, state in zip(whole, walk.normed(norm), strict=True)
            ]
            return float(torch.cat(each).mean())

        return {name: Cost(divergence(walk), self._weights[name]) for name, walk in self._tried.items()}


def tried(rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Parts of a few of ``rows``, evenly spread: their beginnings, or what follows where all begin alike."""
    alike = len(os.path.commonprefix([list(row) for row in rows]))
    some = rows[:: max(1, len(rows) // ROWS)][:ROWS]
    starts = [max(0, min(alike, len(row) - ROW_TOKENS)) for row in some]
    return [row[start : start + ROW_TOKENS] for row, start in zip(some, starts)]
