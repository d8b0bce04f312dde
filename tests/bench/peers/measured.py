"""What every contender's script shares. Runs in the contender's own environment: standard library alone."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """What to run: ``python SCRIPT work.json``."""

    model: str  # Hugging Face folder; for llama.cpp a GGUF file
    dtype: str  # bf16 | int8
    threads: int
    requests: list[tuple[list[int], int]]  # token ids and how many to make of them
    shared: int  # tokens that all prompts begin with


def main(open_engine: Callable[[Work], Callable[[list[tuple[list[int], int]]], int]]) -> None:
    """Open, warm up, run; print seconds and peak memory as a JSON line.

    ``open_engine`` returns a function that completes requests and says how many tokens it made.
    """
    begun = time.perf_counter()
    told = json.loads(Path(sys.argv[1]).read_text())
    work = Work(**told | {"requests": [(ids, tokens) for ids, tokens in told["requests"]]})
    generate = open_engine(work)
    opened = time.perf_counter() - begun
    # Warm up on short strangers, so that the prefix that the requests share is not found beforehand.
    generate([([7 + i] * 24, 8) for i in range(8)])
    begun = time.perf_counter()
    if work.shared:  # whoever finds a prefix only once a request with it has ended is given that
        made = generate(work.requests[:1]) + generate(work.requests[1:])
    else:
        made = generate(work.requests)
    seconds = time.perf_counter() - begun
    wanted = sum(tokens for _, tokens in work.requests)
    assert made == wanted, f"made {made} tokens, {wanted} were wanted"
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": seconds, "open_seconds": opened, "peak_rss_mb": round(peak / 1024)}))
