"""Budget: what quantising may cost a model. Where it costs more, the matrices that cost most stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from batchinfer.engine.quant import Quantizer
from batchinfer.engine.quant.sensitivity import Cost

MOST_KEPT = 0.5  # of the weights of matrices: beyond that there is little left of the scheme
MARGIN = 0.8  # of the budget that is aimed at
ATTEMPTS = 3  # at keeping enough


def within(most: float, quantised: Callable[..., Quantizer]) -> Quantizer:
    """Quantise a model so that its perplexity grows by no more than ``most``, if that can be.

    Args:
        quantised: given what a Quantizer is to keep, or whether to try what each matrix costs: one that has seen the
            whole model.

    Returns:
        The one that saw it last. Whether it is within ``most`` is for the caller to judge.
    """
    made = quantised()
    within_reach = made.scheme is not None and most > 0 and math.isfinite(made.quality.loss)
    if made.quality.loss <= most or not within_reach:
        return made
    costs = quantised(trying=True).costs
    for _ in range(ATTEMPTS):
        kept = costliest(costs, _left(made.kept, costs) * MARGIN * most / made.quality.loss)
        if kept == made.kept:  # no more may be
            break
        made = quantised(kept=kept)
        if made.quality.loss <= most:
            break
    return made


def costliest(costs: Mapping[str, Cost], left: float) -> tuple[str, ...]:
    """The matrices without which no more than the share ``left`` of all cost is left: those that cost most a weight.

    Where that takes more than MOST_KEPT of the weights, so many of them.
    """
    chosen: tuple[str, ...] = ()
    room = MOST_KEPT * sum(cost.weights for cost in costs.values())
    for name in sorted(costs, key=lambda name: costs[name].divergence / costs[name].weights, reverse=True):
        room -= costs[name].weights
        if _left(chosen, costs) <= left or room < 0:
            break
        chosen += (name,)
    return tuple(sorted(chosen))


def _left(kept: Collection[str], costs: Mapping[str, Cost]) -> float:
    """The share of all cost that is left without those of ``kept``."""
    rest = sum(cost.divergence for name, cost in costs.items() if name not in kept)
    return rest / sum(cost.divergence for cost in costs.values())
