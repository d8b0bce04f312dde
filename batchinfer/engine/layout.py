"""Layout: which rank holds which part of the model, and who sends what to whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from batchinfer.engine.model.shard import Shard
from batchinfer.engine.model.spec import DecoderSpec


@dataclass(frozen=True)
class Layout:
    """A whole model over ``len(partition)`` stages of ``tp`` ranks each, numbered from ``first`` on.

    Ranks of a stage are neighbours, so that they share a machine.
    """

    tp: int
    partition: tuple[int, ...]  # layers of each stage
    first: int = 0
    role: str = ""  # prefill | decode, where two layouts share the work
    head_floats: bool = False  # the first stage has the head as well, and computes it for some of the steps

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.tp * len(self.partition))

    def stage(self, rank: int) -> int:
        return (rank - self.first) // self.tp

    def share(self, rank: int) -> int:
        """Its place among the ranks of its stage."""
        return (rank - self.first) % self.tp

    def team(self, rank: int) -> range:
        """The ranks that share a stage with this one, itself included."""
        first = rank - self.share(rank)
        return range(first, first + self.tp)

    def name(self, rank: int) -> str:
        """As people know it."""
        parts = [self.role] if self.role else []
        parts.append(f"stage {self.stage(rank) + 1} of {len(self.partition)}")
        if self.tp > 1:
            parts.append(f"share {self.share(rank) + 1} of {self.tp}")
        return f"rank {rank} ({', '.join(parts)})"

    def hops(self) -> Iterator[tuple[int, int]]:
        """Pairs of ranks that the residual stream goes between."""
        return ((rank, rank + self.tp) for rank in self.ranks[: -self.tp])

    @property
    def sampler(self) -> int:
        """The rank that has the last layer, and chooses tokens, but where the first stage computes the head."""
        return self.ranks[-self.tp]

    def feedback(self) -> Iterator[tuple[int, int]]:
        """Pairs of ranks that chosen tokens go between, or what they are chosen from, to those that begin with them."""
        return ((self.sampler, rank) for rank in self.ranks[: self.tp] if rank != self.sampler)

    def shard(self, model: DecoderSpec, rank: int) -> Shard:
        stage = self.stage(rank)
        first = sum(self.partition[:stage])
        layers = range(first, first + self.partition[stage])
        return Shard(model, layers, self.tp, self.share(rank), self.head_floats)


class Piece(NamedTuple):
    """Keys and values that one rank has computed and another needs: these heads of these layers, of whatever page."""

    source: int
    target: int
    layers: range
    kv_heads: range


@dataclass(frozen=True)
class World:
    """All ranks: one layout, or one that computes prompts and another that decodes."""

    layouts: tuple[Layout, ...]

    @property
    def size(self) -> int:
        return self.layouts[-1].ranks.stop

    def layout(self, rank: int) -> Layout:
        return next(layout for layout in self.layouts if rank in layout.ranks)

    def hops(self) -> Iterator[tuple[int, int]]:
        return (hop for layout in self.layouts for hop in layout.hops())

    def feedback(self) -> list[tuple[int, int]]:
        """Of the ranks that decode; what follows a prompt goes through the engine."""
        return list(self.layouts[-1].feedback())

    def pieces(self, model: DecoderSpec) -> list[Piece]:
        """What goes from the first layout's ranks to the last's, each head of each layer once, however both are cut."""
        if len(self.layouts) == 1:
            return []
        source, target = self.layouts
        found = []
        for rank in target.ranks:
            wanted = target.shard(model, rank)
            for stage in range(len(source.partition)):
                team = [source.first + stage * source.tp + share for share in range(source.tp)]
                held = {holder: source.shard(model, holder) for holder in team}
                layers = _overlap(held[team[0]].layers, wanted.layers)
                holders = ((next(r for r in team if head in held[r].kv_heads), head) for head in wanted.kv_heads)
                for holder, heads in groupby(holders, key=lambda pair: pair[0]):
                    numbers = [head for _, head in heads]
                    if layers:
                        found.append(Piece(holder, rank, layers, range(numbers[0], numbers[-1] + 1)))
        return found


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))
