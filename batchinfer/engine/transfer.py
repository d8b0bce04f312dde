"""KV transfer: prompts are computed by some ranks and decoded by others, and their pages follow.

Pages have one number everywhere, so that nothing but their content is moved. Sequences that go on from a token of their
own decode; all others are prompts, or are computed again, in steps of their own. The pages that such a step writes to
are sent as soon as it is computed, while the next one is. The decoding ranks take them in when the engine has the
step's tokens, before the first step that may read them: until then they decode others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import Store

from batchinfer.engine import neighbour
from batchinfer.engine.clock import HostClock
from batchinfer.engine.comm import Peers
from batchinfer.engine.layout import Piece, World
from batchinfer.engine.model.shard import Shard
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.stage import Stage
from batchinfer.engine.step import StepBatch
from batchinfer.errors import EngineError

PIECE_BYTES = 4 << 20  # about what goes in one tensor: large enough to be fast, small enough to be on its way soon
GPU_PIECE_BYTES = 256 << 20  # what a link carries while a few kernels are launched


def pages_of(step: StepBatch, page_size: int) -> np.ndarray:
    """The pages that a step writes to, int32, each once."""
    return np.unique(step.slots // page_size).astype(np.int32)


class Transfer(Protocol):
    """One rank's part in it. Each side calls for the same steps in the same order."""

    def expect(self, pages: np.ndarray) -> None:
        """A step that will write to ``pages`` is known: begin to receive, as far as that can be begun."""

    def allow(self) -> None:
        """From here on nobody on this rank uses the pages of the next step that has not been allowed to come."""

    def send(self, pages: np.ndarray) -> tuple[Any, Any] | None:
        """Begin to send this rank's share of ``pages`` to all who need a piece of it; when that begins and ends."""

    def take(self, pages: np.ndarray) -> tuple[Any, Any] | None:
        """Put what was sent into this rank's pages, or wait until it is there; when that begins and ends."""


class Parcels:
    """Pieces of pages go from rank to rank as tensors, however far apart they are."""

    def __init__(self, stage: Stage, peers: Peers, pieces: Sequence[Piece], rank: int, clock: HostClock) -> None:
        self._stage, self._peers, self._clock = stage, peers, clock
        self._outgoing = [piece for piece in pieces if piece.source == rank]
        self._incoming = [piece for piece in pieces if piece.target == rank]
        self._allowed: list[Any] = []

    def expect(self, pages: np.ndarray) -> None:
        for piece in self._incoming:
            for views, numbers in self._parcels(piece, pages):
                shape = (len(views), len(numbers), *views[0].shape[1:])
                self._peers.expect(piece.source, shape, views[0].dtype)

    def allow(self) -> None:
        self._allowed.append(self._clock.now())

    def send(self, pages: np.ndarray) -> tuple[Any, Any]:
        begun = self._clock.now()
        for piece in self._outgoing:
            for views, numbers in self._parcels(piece, pages):
                self._peers.send(piece.target, torch.stack([view[numbers] for view in views]))
        return begun, self._clock.now()

    def take(self, pages: np.ndarray) -> tuple[Any, Any]:
        with self._clock.beside(self._allowed.pop(0)):
            begun = self._clock.now()
            for piece in self._incoming:
                for views, numbers in self._parcels(piece, pages):
                    for view, content in zip(views, self._peers.receive(piece.source), strict=True):
                        view[numbers] = content
            return begun, self._clock.now()

    def _parcels(self, piece: Piece, pages: np.ndarray) -> Iterator[tuple[list[Tensor], Tensor]]:
        """A piece of ``pages``, some pages at a time: where they lie, and which pages."""
        views, on_gpu = self._stage.kv_views(piece.layers, piece.kv_heads), self._stage.device.type == "cuda"
        if on_gpu:
            views = [view.view(torch.int64) for view in views]  # as wide as a thread can copy it
        elif views[0].dtype.itemsize == 1:  # not every operation knows FP8
            views = [view.view(torch.uint8) for view in views]
        most = max(1, (GPU_PIECE_BYTES if on_gpu else PIECE_BYTES) // _page_bytes(views))
        for first in range(0, len(pages), most):
            yield views, torch.from_numpy(pages[first : first + most].astype(np.int64)).to(self._stage.device)


def _page_bytes(views: list[Tensor]) -> int:
    return sum(view[0].numel() * view.dtype.itemsize for view in views)


class Direct:
    """GPUs of one machine: who has computed pages writes them to where they belong, and the other only decodes.

    A pair of ranks has two counters of steps: at the one that sends, how many may come; at the other, how many have.
    """

    def __init__(
        self,
        stage: Stage,
        peers: Peers,
        world: World,
        model: DecoderSpec,
        rank: int,
        clock: HostClock,
        store: Store,
    ) -> None:
        """
        Args:
            store: where ranks show each other their memory.

        Raises:
            EngineError: memory of some rank cannot be seen from here.
        """
        pieces = world.pieces(model)
        self._peers, self._clock = peers, clock
        self._sources = sorted({piece.source for piece in pieces if piece.target == rank})
        self._targets = sorted({piece.target for piece in pieces if piece.source == rank})
        self._counters = torch.zeros(world.size, dtype=torch.int32, device=stage.device)
        for name, memory in (("counters", self._counters), ("pages", stage.caches[0])):
            store.set(f"{name} {rank}", _shown(memory))
        ours = self._counters.data_ptr()
        self._told_by = {other: ours + 4 * other for other in (*self._sources, *self._targets)}
        self._tells = {other: _seen(store, f"counters {other}") + 4 * rank for other in self._told_by}
        bases = {target: _seen(store, f"pages {target}") for target in self._targets}
        self._routes = [
            Route.of(stage, piece, world.layout(piece.target).shard(model, piece.target), bases[piece.target])
            for piece in pieces
            if piece.source == rank
        ]
        self._allowed = self._sent = self._taken = 0

    def expect(self, pages: np.ndarray) -> None:
        """It comes without being asked for."""

    def allow(self) -> None:
        self._allowed += 1
        for source in self._sources:
            neighbour.raise_to(self._tells[source], self._allowed)

    def send(self, pages: np.ndarray) -> tuple[Any, Any]:
        self._sent += 1
        with self._clock.aside():
            for target in self._targets:
                neighbour.wait_for(self._told_by[target], self._sent)
            begun = self._clock.now()
            for route in self._routes:
                self._peers.sent += route.copy(pages)
            ended = self._clock.now()
            for target in self._targets:
                neighbour.raise_to(self._tells[target], self._sent)
            return begun, ended

    def take(self, pages: np.ndarray) -> None:
        self._taken += 1
        for source in self._sources:
            neighbour.wait_for(self._told_by[source], self._taken)


class Route(NamedTuple):
    """From a rank's pages to another's: where the piece of the first page lies, and how far apart all else, in bytes.

    Of a page, a piece has as many rows as keys and values of layers; in a row its heads lie side by side.
    """

    source: int
    target: int
    source_page: int
    target_page: int
    source_row: int
    target_row: int
    width: int
    rows: int

    @classmethod
    def of(cls, stage: Stage, piece: Piece, target: Shard, base: int) -> Route:
        """
        Args:
            target: the shard of the rank that keeps its pages at ``base``.
        """
        [ours] = stage.kv_views(piece.layers, piece.kv_heads)
        [theirs] = stage.kv_views(piece.layers, piece.kv_heads, target)
        size, (_, heads, layers, both, numbers) = ours.itemsize, ours.shape
        for view in (ours, theirs):
            assert view.shape[1:] == ours.shape[1:] and view.stride(2) == both * view.stride(3)
            assert view.stride()[1::3] == (numbers, 1)
        (source_page, _, _, source_row, _), (target_page, _, _, target_row, _) = ours.stride(), theirs.stride()
        steps = (size * stride for stride in (source_page, target_page, source_row, target_row))
        return cls(
            ours.data_ptr(), base + size * theirs.storage_offset(), *steps, size * heads * numbers, layers * both
        )

    def copy(self, pages: np.ndarray) -> int:
        """Begin to; pages beside each other go at once where a piece is all of a page. Returns how many bytes."""
        whole = self.source_page == self.target_page == self.width
        first = np.flatnonzero(np.diff(pages, prepend=-2) != 1) if whole else np.arange(len(pages))
        for page, count in zip(pages[first].tolist(), np.diff(first, append=len(pages)).tolist()):
            neighbour.copy_rows(
                self.target + page * self.target_page, self.target_row,
                self.source + page * self.source_page, self.source_row, count * self.width, self.rows,
            )  # fmt: skip
        return len(pages) * self.width * self.rows


def _shown(memory: Tensor) -> str:
    """Empty where the driver does not let others see it: all who wait for it are to know."""
    try:
        return neighbour.show(memory)
    except EngineError:
        return ""


def _seen(store: Store, key: str) -> int:
    if not (shown := store.get(key).decode()):
        raise EngineError(f"{key} cannot be seen by other processes")
    return neighbour.see(shown)


def all_agree(store: Store, rank: int, ranks: int, yes: bool) -> bool:
    """Whether all ranks say yes."""
    store.set(f"agrees {rank}", "yes" if yes else "no")
    return all(store.get(f"agrees {other}") == b"yes" for other in range(ranks))
