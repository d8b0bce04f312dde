"""What two ranks of this CPU pay to reach each other: ``python -m tests.bench.exchange``.

They send a step's residual stream there and back (a hop is half of that) and sum up as much, through shared memory and
through gloo in turn. Prints a JSON line for each size, microseconds: median and least.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from batchinfer.engine.comm import Arena, DistributedPeers, Peers, SharedPeers, Sizes
from batchinfer.engine.layout import Layout, World

HIDDEN = 576  # of the demo model
ROWS = (1, 32, 128, 512)
ROUNDS = 5
DEADLINE = 60.0
SIDE_BY_SIDE, ONE_AFTER_THE_OTHER = World((Layout(2, (1,)),)), World((Layout(1, (1, 1)),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, folder, repeats)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()


def _rank(rank: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    gloo_team = DistributedPeers(SIDE_BY_SIDE, rank, DEADLINE, store, torch.device("cpu"))
    kinds = {
        "shared memory": (
            _shared(ONE_AFTER_THE_OTHER, rank, f"{folder}/hops"),
            _shared(SIDE_BY_SIDE, rank, f"{folder}/sums"),
        ),
        "gloo": (gloo_team, gloo_team),
    }
    for rows in ROWS:
        x = torch.ones(rows, HIDDEN)
        taken: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for kind, (line, team) in kinds.items():
                hop = [seconds / 2 for seconds in _times(repeats, _there_and_back, line, rank, x)]
                taken.setdefault((kind, "hop"), []).extend(hop)
                taken.setdefault((kind, "sum"), []).extend(_times(repeats, _sum, team, x))
        if rank == 0:
            told = {
                f"{what}, {kind}": [round(1e6 * statistics.median(found), 1), round(1e6 * min(found), 1)]
                for (kind, what), found in taken.items()
            }
            print(json.dumps({"rows": rows, "kib": x.nbytes / 1024, **told}), flush=True)


def _shared(world: World, rank: int, path: str) -> SharedPeers:
    size = max(ROWS) * HIDDEN * 4
    sizes, back = Sizes(2, size, size, size, size), [(1, 0)]
    need = Arena()
    SharedPeers(need, world, back, 0, DEADLINE, sizes)
    with open(path, "a+b") as file:
        file.truncate(need.used)
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    return SharedPeers(Arena(memory), world, back, rank, DEADLINE, sizes)


def _there_and_back(peers: Peers, rank: int, x: torch.Tensor) -> None:
    peers.expect(1 - rank, tuple(x.shape), x.dtype)
    if rank == 0:
        peers.send(1, x)
        peers.receive(1)
    else:
        peers.send(0, peers.receive(0))


def _sum(peers: Peers, x: torch.Tensor) -> None:
    peers.all_reduce(x.clone())


def _times(repeats: int, work: Callable[..., None], *about: Any) -> list[float]:
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work(*about)
        taken.append(time.perf_counter() - begun)
    return taken


if __name__ == "__main__":
    main()
