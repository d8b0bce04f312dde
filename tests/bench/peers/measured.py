"""What every contender's script shares. Runs in the contender's own environment: standard library alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workload:
    requests: list[tuple[list[int], int]]  # token ids and how many to make of them
    shared: int  # tokens that all prompts begin with


@dataclass(frozen=True)
class Work:
    """What to run: ``python SCRIPT work.json``."""

    model: str  # a Hugging Face folder, or what else the contender reads
    dtype: str  # bf16 | int8
    threads: int
    workloads: dict[str, Workload]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(ids) + tokens for each in self.workloads.values() for ids, tokens in each.requests)


def read_work() -> Work:
    told = json.loads(Path(sys.argv[1]).read_text())
    workloads = {
        name: Workload([(ids, tokens) for ids, tokens in each["requests"]], each["shared"])
        for name, each in told.pop("workloads").items()
    }
    return Work(**told, workloads=workloads)


Generate = Callable[[list[tuple[list[int], int]], int], int]


def main(open_engine: Callable[[Work], Generate]) -> None:
    """Open, warm up, run; print seconds of each workload and the peak memory as a JSON line.

    ``open_engine`` returns a function that completes requests, which begin with so many tokens that all share, and says
    how many tokens it made.
    """
    begun = time.perf_counter()
    work = read_work()
    generate = open_engine(work)
    opened = time.perf_counter() - begun
    # Warm up on short strangers, so that no prefix is found beforehand.
    generate([([7 + i] * 24, 8) for i in range(8)], 0)
    seconds = {}
    for name, each in work.workloads.items():
        begun = time.perf_counter()
        made = 0
        rest = each.requests
        if each.shared:  # whoever finds a prefix only once a request with it has ended is given that
            made, rest = generate(rest[:1], each.shared), rest[1:]
        made += generate(rest, each.shared)
        seconds[name] = time.perf_counter() - begun
        wanted = sum(tokens for _, tokens in each.requests)
        assert made == wanted, f"{name}: made {made} tokens, {wanted} were wanted"
    print(json.dumps({"seconds": seconds, "open_seconds": opened, "peak_rss_mb": peak_rss_mb()}))


def peak_rss_mb() -> int:
    """The most memory that this process has held. Unlike ru_maxrss it counts nothing of the parent's."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
