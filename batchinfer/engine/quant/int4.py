"""INT4 in groups, round to nearest: each group between its smallest and its largest weight, zero included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer.engine.kernels.linear import int4

MOST = 15


@dataclass(frozen=True)
class Grid:
    """The numbers that weights of some groups can be: ``(code - zero) * scale`` for codes of 0 to 15."""

    scale: Tensor  # float32 [N, groups]
    zero: Tensor  # float32 [N, groups], whole

    @classmethod
    def over(cls, weight: Tensor, group: int, shrink: Tensor | float = 1.0) -> Grid:
        """The grid of float32 ``[N, K]``; ``shrink`` (of ``[N, groups]``) narrows ranges, to clip what lies outside."""
        low = _in_groups(weight, group).amin(-1).clamp_(max=0) * shrink
        high = _in_groups(weight, group).amax(-1).clamp_(min=0) * shrink
        scale = ((high - low) / MOST).clamp_(min=torch.finfo(torch.float32).tiny)
        return cls(scale, (-low / scale).round_().clamp_(0, MOST))

    def codes(self, weight: Tensor, group: int) -> Tensor:
        """The nearest code of each weight, uint8 ``[N, K]``."""
        codes = (_in_groups(weight, group) / self.scale[..., None]).round_() + self.zero[..., None]
        return codes.clamp_(0, MOST).flatten(1)[:, : weight.shape[1]].to(torch.uint8)

    def rounded(self, weight: Tensor, group: int) -> Tensor:
        """The nearest numbers of the grid, float32 ``[N, K]``."""
        codes = self.codes(weight, group)
        values = (_in_groups(codes.float(), group) - self.zero[..., None]) * self.scale[..., None]
        return values.flatten(1)[:, : weight.shape[1]]

    def tensors(self, codes: Tensor, group: int) -> dict[str, Tensor]:
        """The form ``int4`` of a linear."""
        zero = self.zero.to(torch.uint8)
        return {
            "int4": int4.pack(codes),
            "scale": self.scale,
            "zero": zero,
            "group": torch.tensor(min(group, codes.shape[1])).int(),
        }


def quantize(weight: Tensor, group: int) -> dict[str, Tensor]:
    """float32 ``[N, K]``, K even, → the form ``int4``: see ``kernels.linear.int4``."""
    grid = Grid.over(weight, group)
    return grid.tensors(grid.codes(weight, group), group)


def _in_groups(weight: Tensor, group: int) -> Tensor:
    """``[N, K]`` → ``[N, groups, group]``, the last column repeated to fill the last group: no range is widened."""
    group = min(group, weight.shape[1])
    missing = -weight.shape[1] % group
    if missing:
        weight = F.pad(weight[None], (0, missing), mode="replicate")[0]
    return weight.view(weight.shape[0], -1, group)
