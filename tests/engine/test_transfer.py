"""Pages that a GPU writes to another's memory come to lie where that one looks for them, and not too soon."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from batchinfer.engine import neighbour
from batchinfer.engine.clock import HostClock
from batchinfer.engine.comm import Alone
from batchinfer.engine.layout import Layout, World
from batchinfer.engine.model.spec import DecoderSpec, RopeSpec
from batchinfer.engine.stage import Stage
from batchinfer.engine.transfer import Direct

gpu = pytest.importorskip("batchinfer.engine.kernels.gpu", reason="no Triton", exc_type=ImportError)

SPEC = DecoderSpec(
    family="llama", hidden_size=64, intermediate_size=64, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=16,
    vocab_size=100, rms_norm_eps=1e-5, rope=RopeSpec(theta=1e4), max_position=512, tied_head=False,
)  # fmt: skip
PAGES = 12


class Rank(Stage):
    """A stage's pages, in this process's memory, and nothing else of it."""

    def __init__(self, world: World, rank: int) -> None:
        self.shard = world.layout(rank).shard(SPEC, rank)
        self.kernels, self.num_pages = gpu.KERNELS, PAGES
        self._how_kept = torch.bfloat16, torch.float8_e4m3fn
        self.device = torch.device("cpu")
        attention = self._attention(self.shard.spec, self.device)
        self.decoder = SimpleNamespace(attention=attention)
        self.caches = attention.allocate(self.shard.spec.num_layers, PAGES)
        shape = (len(self.caches), *self.caches[0].shape)
        self.whole = self.caches[0].view(torch.uint8).as_strided(shape, torch.empty(shape, device="meta").stride())


@pytest.fixture
def one_memory(monkeypatch):
    """The driver's work, done at once; a stream that would have to wait says so."""

    def copy_rows(target, target_pitch, source, source_pitch, width, rows):
        for row in range(rows):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    def wait_for(address, value):
        assert ctypes.c_int32.from_address(address).value >= value, "it would have come too soon"

    def raise_to(address, value):
        ctypes.c_int32.from_address(address).value = value

    monkeypatch.setattr(neighbour, "show", lambda x: str(x.data_ptr()))
    monkeypatch.setattr(neighbour, "see", int)
    for name, work in (("copy_rows", copy_rows), ("wait_for", wait_for), ("raise_to", raise_to)):
        monkeypatch.setattr(neighbour, name, work)


def sides(*layouts: tuple[int, tuple[int, ...]]) -> tuple[World, list[Rank], list[Direct], list[Alone]]:
    """All ranks of layouts behind each other, given by their tp and partition."""
    (tp, partition), decoding = layouts
    world = World((Layout(tp, partition, 0, "prefill"), Layout(*decoding, tp * len(partition), "decode")))
    ranks, peers, store = [Rank(world, n) for n in range(world.size)], [Alone() for _ in range(world.size)], HashStore()

    def direct(n: int) -> Direct:
        return Direct(ranks[n], peers[n], world, SPEC, n, HostClock(), store)

    with ThreadPoolExecutor(world.size) as threads:  # each waits for what others show
        return world, ranks, list(threads.map(direct, range(world.size))), peers


@pytest.mark.parametrize(
    ("before", "decoding"), [((1, (4,)), (1, (4,))), ((2, (4,)), (1, (2, 2))), ((1, (3, 1)), (4, (4,)))]
)
def test_pages_lie_where_another_rank_looks_for_them(one_memory, before, decoding):
    world, ranks, transfers, peers = sides(before, decoding)
    model = torch.randint(1, 256, (SPEC.num_layers, 2, PAGES, SPEC.num_kv_heads, 64 * 16), dtype=torch.uint8)
    senders, takers = (list(layout.ranks) for layout in world.layouts)
    for number, rank in enumerate(ranks):
        rank.whole.copy_(part(model, rank) if number in senders else torch.zeros_like(rank.whole))
    for pages in map(np.int32, ([3], [0, 1, 2, 7, 9, 10], [11])):
        for number in takers:
            transfers[number].allow()
        for number in senders:
            transfers[number].send(pages)
        for number in takers:
            transfers[number].take(pages)
            assert ranks[number].whole[:, :, pages].equal(part(model, ranks[number])[:, :, pages])
    for number in takers:
        assert not ranks[number].whole[:, :, [4, 5, 6, 8]].any(), "others are left alone"
    assert sum(peer.sent for peer in peers) == model[:, :, :8].numel()


def test_pages_wait_until_they_may_come_and_are_waited_for(one_memory):
    with pytest.raises(AssertionError, match="too soon"):
        sides((1, (4,)), (1, (4,)))[2][0].send(np.int32([1]))
    with pytest.raises(AssertionError, match="too soon"):
        sides((1, (4,)), (1, (4,)))[2][1].take(np.int32([1]))


def part(model: torch.Tensor, rank: Rank) -> torch.Tensor:
    layers, heads = (slice(each.start, each.stop) for each in (rank.shard.layers, rank.shard.kv_heads))
    return model[layers, :, :, heads]
