"""Layers in one call compute, bit for bit, what the operators do one after another."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from batchinfer.engine.kernels import select
from batchinfer.engine.kernels.cpu import linear as cpu
from batchinfer.engine.kernels.linear import load_linear
from batchinfer.engine.model.decoder import Layer
from batchinfer.engine.quant import int8
from tests.engine.kernels.batches import Sequences, rope_table

EPS = 1e-5
QUANTIZE = {"bf16": lambda weight: {"weight": weight.bfloat16()}, "w8a8": int8.quantize_w8a8}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_layer(rng: np.random.Generator, forms: list[str], hidden: int, heads: int, qkv: int, inner: int, dim: int):
    group, normed = {}, bool(rng.integers(2))
    shapes = {"qkv": (qkv, hidden), "o": (hidden, heads), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    for name, (outputs, inputs) in shapes.items():
        made = QUANTIZE[forms[rng.integers(len(forms))]](torch.randn(outputs, inputs) / inputs**0.5)
        group |= {f"{name}.{part}": tensor for part, tensor in made.items()}
        if rng.integers(2):
            group[f"{name}.bias"] = torch.randn(outputs).bfloat16()
    vectors = {"attn_norm.weight": hidden, "mlp_norm.weight": hidden}
    vectors |= {"q_norm.weight": dim, "k_norm.weight": dim} if normed else {}
    group |= {name: torch.rand(width) + 0.5 for name, width in vectors.items()}
    return Layer.from_weights(group, dict.fromkeys(group, "own"))


def one_after_another(kernels, attention, layers, residual, cos_sin, batch, caches):
    normed, q, delta = torch.empty_like(residual, dtype=torch.bfloat16), None, None
    for layer, cache in zip(layers, caches):
        kernels.add_rms_norm(residual, delta, layer.attn_norm, EPS, normed)
        qkv = layer.qkv(normed)
        q = torch.empty(len(qkv), attention.num_heads * attention.head_dim, dtype=torch.bfloat16)
        attention.rope_write(qkv, cos_sin, batch, cache, layer.q_norm, layer.k_norm, EPS, q)
        o = layer.o(attention.attend(q, batch, cache, torch.empty_like(q)))
        kernels.add_rms_norm(residual, o, layer.mlp_norm, EPS, normed)
        activated = torch.empty(len(normed), layer.down.product.matrix.k, dtype=torch.bfloat16)
        delta = layer.down(layer.gate_up.gated(normed, activated))
    return delta


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("kept", [None, torch.int8])
@pytest.mark.parametrize("forms", [["bf16"], ["w8a8"], ["bf16", "w8a8"]])
def test_one_call_gives_the_bits_of_the_operators_one_after_another(forms, kept, threads):
    if cpu.operators() is None:
        pytest.skip("this CPU has no layers in one call")
    torch.set_num_threads(threads)
    kernels = select(CPU, torch.bfloat16)
    for seed in range(6):
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        dim, kv_heads, group = int(rng.choice([16, 48, 64])), int(rng.integers(1, 4)), int(rng.integers(1, 5))
        heads, window = kv_heads * group, [None, 24][rng.integers(2)]
        attention = kernels.attention(heads, kv_heads, dim, 16, window, torch.bfloat16, CPU, kept)
        hidden, inner = 2 * int(rng.integers(8, 60)), 16 * int(rng.integers(1, 9))
        shape = hidden, heads * dim, (heads + 2 * kv_heads) * dim, inner, dim
        layers = [random_layer(rng, forms, *shape) for _ in range(3)]
        fused = kernels.fuse(layers, attention, 700, EPS)
        contexts = rng.integers(1, 500 if seed == 0 else 90, 1 if seed == 0 else 7).tolist()
        queries = contexts if seed == 0 else [int(rng.integers(1, c + 1)) for c in contexts]
        sequences = Sequences.random(rng, contexts, queries, 16)
        results = []
        for run in (fused, functools.partial(one_after_another, kernels, attention, layers)):
            caches = attention.allocate(len(layers), sequences.num_pages)
            for cache in caches:
                cache.zero_()
            steps = [sequences.last()] if seed == 0 else [sequences.history(), sequences.last()]
            for step, batch in enumerate(steps):
                torch.manual_seed(step)
                residual = torch.randn(len(batch.positions), hidden)
                delta = run(residual, rope_table(dim, 512), batch, caches).clone()
            results.append((residual, delta, *caches))
        assert torch.isfinite(results[0][0]).all()
        for one, other in zip(*results):
            assert torch.equal(one, other)


def test_what_is_not_all_our_own_is_not_fused():
    kernels = select(CPU, torch.bfloat16)
    if cpu.operators() is None:
        pytest.skip("this CPU has no layers in one call")
    attention = kernels.attention(2, 1, 16, 16, None, torch.bfloat16, CPU)
    rng = np.random.default_rng(0)
    layer = random_layer(rng, ["bf16"], 32, 32, 64, 16, 16)
    other = dataclasses.replace(layer, o=load_linear({"o.weight": torch.randn(32, 32)}, "o"))
    assert kernels.fuse([layer], attention, 8, EPS) is not None
    assert kernels.fuse([layer, other], attention, 8, EPS) is None
    assert kernels.fuse([], attention, 8, EPS) is None
    assert select(CPU, torch.bfloat16, {"add_rms_norm": "torch"}).fuse is None
