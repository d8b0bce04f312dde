"""Layout: which rank holds which part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batchinfer.engine.model.shard import Shard
from batchinfer.engine.model.spec import DecoderSpec


@dataclass(frozen=True)
class Layout:
    """``len(partition)`` stages of ``tp`` ranks each. Ranks of a stage are neighbours, so that they share a machine."""

    tp: int
    partition: tuple[int, ...]  # layers of each stage

    @property
    def size(self) -> int:
        return self.tp * len(self.partition)

    def stage(self, rank: int) -> int:
        return rank // self.tp

    def team(self, rank: int) -> range:
        """The ranks that share a stage with this one, itself included."""
        first = self.stage(rank) * self.tp
        return range(first, first + self.tp)

    def name(self, rank: int) -> str:
        """As people know it."""
        within = f", share {rank % self.tp + 1} of {self.tp}" if self.tp > 1 else ""
        return f"rank {rank} (stage {self.stage(rank) + 1} of {len(self.partition)}{within})"

    def hops(self) -> Iterator[tuple[int, int]]:
        """Pairs of ranks that the residual stream goes between."""
        return ((rank, rank + self.tp) for rank in range(self.size - self.tp))

    def shard(self, model: DecoderSpec, rank: int) -> Shard:
        stage = self.stage(rank)
        first = sum(self.partition[:stage])
        return Shard(model, range(first, first + self.partition[stage]), self.tp, rank % self.tp)
