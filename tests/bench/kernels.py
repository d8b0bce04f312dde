"""How far each CPU kernel is from what the machine could do: ``python -m tests.bench.kernels [--threads N] [--fp32]``.

Times are the best of many repeats, in wall-clock time. Reads are compared with a sum over 512 MiB, arithmetic with a
1024³ matrix product of torch in the same dtype. Shapes are those of a 135M Llama (9 heads, 3 KV heads of 64).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from batchinfer.engine.clock import best_seconds
from batchinfer.engine.kernels import select
from tests.engine.kernels.batches import Sequences, rope_table, sampling_batch

HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 9, 3, 64, 576, 1536, 49152, 30


def best(work: Callable[[], object], repeats: int = 15) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one that warms up."""
    return best_seconds(work, torch.device("cpu"), 0.0, repeats)


class Limits:
    """What this machine reads and multiplies with the threads it was given."""

    def __init__(self, dtype: torch.dtype) -> None:
        memory = torch.ones(2**26, dtype=torch.int64)
        self.bytes_per_second = memory.nbytes / best(memory.sum, 4)
        a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        self.flops_per_second = 2 * 1024**3 / best(lambda: a @ b, 5)

    def show(self, name: str, seconds: float, read: float = 0, flops: float = 0) -> None:
        line = f"{name:44} {seconds * 1e6:10.1f} µs"
        if read:
            line += f" {read / seconds / 1e9:8.1f} GB/s    {read / seconds / self.bytes_per_second:7.0%} of reading"
        if flops:
            line += f" {flops / seconds / 1e9:8.0f} GFLOP/s {flops / seconds / self.flops_per_second:7.0%} of a GEMM"
        print(line)


def attention(kernels, dtype: torch.dtype, limits: Limits) -> None:
    attention = kernels.attention(HEADS, KV_HEADS, DIM, kernels.attention.page_size, None, dtype, torch.device("cpu"))
    rng = np.random.default_rng(0)
    table = rope_table(DIM, 8192)

    def caches(sequences: Sequences) -> list:
        """Enough layers that none is still in a cache of the processor when its turn comes again."""
        wanted = max(2, min(LAYERS, 400_000_000 // (attention.page_bytes(1) * sequences.num_pages)))
        made = attention.allocate(wanted, sequences.num_pages)
        for cache in made:
            cache.view(torch.int16).random_(15000, 16000)  # small positive numbers as bf16 and as float
        return made

    for count, context in ((64, 96), (64, 256), (8, 2048), (1, 8192)):
        sequences = Sequences.random(rng, [context] * count, [1] * count, attention.page_size)
        layers, batch = caches(sequences), sequences.last()
        q = torch.randn(count, HEADS * DIM).to(dtype)
        out = torch.empty_like(q)

        def decode(layers=layers, batch=batch, q=q, out=out) -> None:
            for cache in layers:
                attention.attend(q, batch, cache, out)

        read = count * context * KV_HEADS * DIM * 2 * dtype.itemsize
        limits.show(f"decode {count} x 1, context {context}", best(decode, 5) / len(layers), read=read)

    for count, tokens, context in ((8, 512, 512), (1, 2048, 2048), (12, 40, 440)):
        sequences = Sequences.random(rng, [context] * count, [tokens] * count, attention.page_size)
        (cache, *_), batch = caches(sequences), sequences.last()
        q = torch.randn(count * tokens, HEADS * DIM).to(dtype)
        out = torch.empty_like(q)
        pairs = tokens * (context - tokens) + tokens * (tokens + 1) / 2
        seconds = best(lambda q=q, batch=batch, cache=cache, out=out: attention.attend(q, batch, cache, out), 8)
        limits.show(f"prefill {count} x {tokens}, context {context}", seconds, flops=count * HEADS * DIM * 4 * pairs)

    for count, tokens in ((64, 1), (1, 512)):
        sequences = Sequences.random(rng, [256 + tokens] * count, [tokens] * count, attention.page_size)
        (cache, *_), batch = caches(sequences), sequences.last()
        qkv = torch.randn(count * tokens, (HEADS + 2 * KV_HEADS) * DIM).to(dtype)
        q = torch.empty(count * tokens, HEADS * DIM, dtype=dtype)
        seconds = best(
            lambda qkv=qkv, batch=batch, cache=cache, q=q: attention.rope_write(
                qkv, table, batch, cache, None, None, 1e-5, q
            )
        )
        limits.show(f"rope and cache write, {count} x {tokens}", seconds, read=2 * qkv.nbytes)


def elementwise(kernels, dtype: torch.dtype, limits: Limits) -> None:
    for tokens in (1, 64, 512):
        residual, weight = torch.randn(tokens, HIDDEN), torch.rand(HIDDEN)
        delta = torch.randn(tokens, HIDDEN).to(dtype)
        out = torch.empty_like(delta)
        seconds = best(lambda r=residual, d=delta, w=weight, o=out: kernels.add_rms_norm(r, d, w, 1e-5, o), 50)
        limits.show(f"add_rms_norm {tokens} x {HIDDEN}", seconds, read=2 * residual.nbytes + 2 * delta.nbytes)
        gate_up = torch.randn(tokens, 2 * INTERMEDIATE).to(dtype)
        out = torch.empty(tokens, INTERMEDIATE, dtype=dtype)
        seconds = best(lambda g=gate_up, o=out: kernels.silu_mul(g, o), 50)
        limits.show(f"silu_mul {tokens} x {INTERMEDIATE}", seconds, read=gate_up.nbytes + out.nbytes)


def sampling(kernels, dtype: torch.dtype, limits: Limits) -> None:
    logits = (torch.randn(64, VOCABULARY) * 3).to(dtype)
    for name, how in {
        "greedy": {},
        "temperature": {"temperature": 1.0},
        "top-k 50": {"temperature": 0.7, "top_k": 50},
        "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
        "top-k 50, top-p 0.9, min-p 0.05": {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    }.items():
        batch = sampling_batch(64, seed=np.arange(64), **how)
        seconds = best(lambda batch=batch: kernels.sample(logits, batch))
        limits.show(f"sample 64 x {VOCABULARY}, {name}", seconds, read=logits.nbytes)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--fp32", action="store_true")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.float32 if options.fp32 else torch.bfloat16
    kernels, limits = select(torch.device("cpu"), dtype), Limits(dtype)
    print(
        f"{kernels.name} kernels, {dtype}, {options.threads} threads; limits: "
        f"{limits.bytes_per_second / 1e9:.1f} GB/s, {limits.flops_per_second / 1e9:.0f} GFLOP/s"
    )
    for part in (attention, elementwise, sampling):
        part(kernels, dtype, limits)


if __name__ == "__main__":
    main()
