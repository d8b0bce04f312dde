"""Workloads of random token ids, seeded: every engine is given the same. Only lengths matter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Workload = list[tuple[list[int], int]]  # (prompt, output tokens)

VOCABULARY = 32000  # ids are drawn below this: every model measured knows them


def _lognormal(rng: np.random.Generator, count: int, median: float, sigma: float, low: int, high: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median), sigma, count).astype(int), low, high)


def _ids(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(10, VOCABULARY, length).tolist()


def chat(count: int = 2000, seed: int = 7) -> Workload:
    """Prompts of 16 to 2048 tokens, median 200; outputs of 16 to 1024, median 180."""
    rng = np.random.default_rng(seed)
    prompts = _lognormal(rng, count, 200, 0.9, 16, 2048)
    outputs = _lognormal(rng, count, 180, 0.6, 16, 1024)
    return [(_ids(rng, prompt), int(output)) for prompt, output in zip(prompts, outputs)]


def extract(count: int = 2000, seed: int = 8) -> Workload:
    """768 tokens that all share, 64 to 447 of their own, outputs of 24 to 48."""
    rng = np.random.default_rng(seed)
    shared = _ids(rng, 768)
    prompts, outputs = rng.integers(64, 448, count), rng.integers(24, 49, count)
    return [(shared + _ids(rng, prompt), int(output)) for prompt, output in zip(prompts, outputs)]


def uniform(count: int = 256, seed: int = 0) -> Workload:
    """Prompts and outputs of 100 to 1024 tokens."""
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(100, 1025, count), rng.integers(100, 1025, count)
    return [(_ids(rng, prompt), int(output)) for prompt, output in zip(prompts, outputs)]


def like_chat(name: str, count: int) -> Workload:
    """A workload that takes about as long as ``count`` requests of chat, or less."""
    return WORKLOADS[name](count // 3 if name == "uniform" else count)


def fixed(prompt: int, output: int, count: int, seed: int = 3) -> Workload:
    rng = np.random.default_rng(seed)
    return [(_ids(rng, prompt), output) for _ in range(count)]


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "chat": chat,
    "extract": extract,
    "uniform": uniform,
    # Shapes that TensorRT-LLM publishes numbers for.
    "128/128": lambda: fixed(128, 128, 3000),
    "1000/1000": lambda: fixed(1000, 1000, 768),
    "2048/128": lambda: fixed(2048, 128, 500),
    "128/2048": lambda: fixed(128, 2048, 1024),
}
