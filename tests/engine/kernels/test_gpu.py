"""What only the GPU's kernels do: FP8 in passing, FP8 keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchinfer.engine.kernels import activation, norm
from batchinfer.engine.kernels.attention import TorchPagedAttention
from batchinfer.engine.kernels.linear.fp8 import E4M3, Unscaled
from tests.engine.kernels.batches import Sequences, rope_table
from tests.engine.kernels.conftest import gpu_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

STEP = 2**-4 + 1e-3  # two e4m3 numbers beside each other differ by an eighth at most: half of it is a rounding


@pytest.fixture
def kernels():
    with torch.device("cuda"):
        yield gpu_kernels()


def quantised(made, expected, work):
    """What ``work`` writes, from poison, against ``expected``."""
    values = torch.full(made, float("nan")).to(E4M3)
    scale = torch.full((made[0], 1), float("nan"))
    work(values, scale)
    assert torch.equal(values.float().abs().amax(dim=1), torch.full_like(scale[:, 0], 448))
    torch.testing.assert_close(values.float() * scale, expected.float(), rtol=STEP, atol=float(scale.max()) / 256)


@pytest.mark.parametrize(("tokens", "width"), [(3, 16), (5, 577), (70, 4096)])
def test_norm_activation_and_attention_are_quantised_in_passing(kernels, dtype, tokens, width):
    residual, weight, delta = torch.randn(tokens, width), torch.rand(width) + 0.5, torch.randn(tokens, width).to(dtype)
    plain = torch.empty(tokens, width)
    expected = norm.add_rms_norm(residual.clone(), delta, weight, 1e-5, plain).clone()
    quantised((tokens, width), expected, lambda *out: kernels.add_rms_norm(residual, delta, weight, 1e-5, *out))
    gate_up = torch.randn(tokens, 2 * width).to(dtype)
    expected = activation.silu_mul(gate_up, plain).clone()
    quantised((tokens, width), expected, lambda *out: kernels.silu_mul(gate_up, *out))
    quantised((tokens, width), delta, lambda *out: kernels.quantize(delta, *out))


def test_kernels_that_read_a_product_scale_it_in_passing(kernels):
    tokens, heads, kv_heads, dim, page = 37, 4, 2, 64, 32
    width = (heads + 2 * kv_heads) * dim
    product = Unscaled(torch.randn(tokens, width).bfloat16(), torch.rand(tokens, 1) + 0.5, torch.rand(1, width) + 0.5)
    scaled = product.values.float() * product.rows * product.columns
    residual, weight, made = torch.randn(tokens, width), torch.rand(width), torch.empty(tokens, width)
    expected = norm.add_rms_norm(residual.clone(), scaled, weight, 1e-5, torch.empty_like(made))
    torch.testing.assert_close(
        kernels.add_rms_norm(residual, product, weight, 1e-5, made), expected, rtol=1e-4, atol=1e-4
    )
    batch = Sequences.random(np.random.default_rng(0), [40, 20, 35], [1, 1, 15], page).last()
    table, few = rope_table(dim, 64), slice(len(batch.slots))
    for kept_as in (None, E4M3):
        fast = kernels.attention(heads, kv_heads, dim, page, None, torch.bfloat16, torch.get_default_device(), kept_as)
        found = []
        for qkv in (Unscaled(product.values[few], product.rows[few], product.columns), scaled[few].bfloat16()):
            (cache,) = fast.allocate(1, 8)
            cache.view(torch.uint8).fill_(0)
            q = torch.empty(len(batch.slots), heads * dim, dtype=torch.bfloat16)
            fast.rope_write(qkv, table, batch, cache, None, None, 1e-6, q)
            found.append((q.float(), cache.float()))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=2 * STEP, atol=2e-2)


def test_a_row_of_zeros_is_quantised_to_zeros(kernels):
    values, scale = torch.full((1, 32), 7.0).to(E4M3), torch.empty(1, 1)
    kernels.quantize(torch.zeros(1, 32), values, scale)
    assert not values.float().any() and scale.isfinite().all()


@pytest.mark.parametrize("sharing", [False, True], ids=["apart", "sharing"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", [(8, 2, 64), (4, 4, 16), (7, 1, 128), (6, 2, 48)], ids=str)
def test_fp8_pages_hold_the_rotated_keys_and_attention_reads_what_they_hold(kernels, shape, window, sharing):
    heads, kv_heads, dim = shape
    from batchinfer.engine.kernels.gpu.attention import CHUNK

    page, rng, device = 32, np.random.default_rng(0), torch.get_default_device()
    dtype = torch.bfloat16
    alike = 9 if sharing else 0  # sequences that begin with the same two pages
    contexts, queries = [70] * alike + [33, 17, 128], [1] * alike + [33, 5, 64]
    if not sharing:
        contexts, queries = [1, 40, 300, *contexts], [1, 1, 1, *queries]
    sequences = Sequences.random(rng, contexts, queries, page)
    for pages in sequences.pages[:alike]:
        pages[:2] = sequences.pages[0][:2]
    fast = kernels.attention(heads, kv_heads, dim, page, window, dtype, device, E4M3)
    fast.scales.copy_(torch.rand_like(fast.scales) + 0.5)
    reference = TorchPagedAttention(heads, kv_heads, dim, page, window, torch.float32, device)
    (cache,) = fast.allocate(1, sequences.num_pages)
    assert cache.nbytes == fast.page_bytes(1) * sequences.num_pages
    cache.view(torch.uint8).fill_(0xFF)
    (exact,) = reference.allocate(1, sequences.num_pages)
    exact.fill_(float("nan"))
    table = rope_table(dim, 512)
    for batch in (sequences.history(), sequences.last()):
        qkv = torch.randn(len(batch.slots), (heads + 2 * kv_heads) * dim).to(dtype)
        if sharing and batch.prefills == len(batch.context_lens):  # the history
            qkv[: 69 * alike].view(alike, 69, -1)[:, : 2 * page] = qkv[: 2 * page]
        q = torch.empty(len(qkv), heads * dim, dtype=dtype)
        fast.rope_write(qkv, table, batch, cache, None, None, 1e-6, q)
        reference.rope_write(
            qkv.float(), table, batch, exact, None, None, 1e-6, torch.empty_like(q, dtype=torch.float32)
        )
        keys = cache[0].float().view(-1, kv_heads, page, dim)
        values = cache[1].float().view(-1, kv_heads, page // CHUNK, dim, CHUNK).transpose(3, 4).reshape(keys.shape)
        held = torch.stack((keys, values)) * fast.scales[:, None, :, None, None]
        held = held.transpose(2, 3).contiguous()
        torch.testing.assert_close(held, exact, rtol=STEP, atol=0.02, equal_nan=True)
        out = fast.attend(q, batch, cache, torch.full_like(q, float("nan")))
        expected = reference.attend(q.float(), batch, held, torch.empty_like(q, dtype=torch.float32))
        decoded, rounded = out[: batch.decodes].float(), out[batch.decodes :].float()
        torch.testing.assert_close(decoded, expected[: batch.decodes], rtol=2e-2, atol=2e-2)
        error = rounded - expected[batch.decodes :]  # queries and weights of prompts are e4m3 numbers too
        assert error.norm() < STEP * expected[batch.decodes :].norm() and error.abs().max() < 0.3
