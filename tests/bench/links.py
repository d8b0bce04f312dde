"""What the links between this machine's GPUs carry, in bytes a second, through NCCL."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

BYTES = 256 << 20
HOP = 16 << 20  # about what goes between two stages


def measure(gpus: int) -> dict[str, float]:
    """Between the first two GPUs ``send``, and ``hop`` of a smaller tensor; ``all_reduce`` between all, of the bus."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    answers = processes.get_context("spawn").SimpleQueue()
    processes.spawn(_rank, (gpus, port, answers), nprocs=gpus)
    return answers.get()


def _rank(rank: int, gpus: int, port: int, answers) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=gpus)
    found = {}
    for name, size in (("send", BYTES), ("hop", HOP)):
        x = torch.ones(size, dtype=torch.uint8, device="cuda")
        found[name] = size / _seconds(functools.partial(_hop, rank, x))
    x = torch.ones(HOP // 2, dtype=torch.bfloat16, device="cuda")
    found["all_reduce"] = HOP / _seconds(lambda: dist.all_reduce(x)) * 2 * (gpus - 1) / gpus
    if rank == 0:
        answers.put({name: round(rate) for name, rate in found.items()})
    dist.destroy_process_group()


def _hop(rank: int, x: torch.Tensor) -> None:
    if rank == 0:
        dist.send(x, 1)
    elif rank == 1:
        dist.recv(x, 0)


def _seconds(work: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / repeats
