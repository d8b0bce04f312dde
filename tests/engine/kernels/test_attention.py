"""Paged attention: the reference against torch's own attention, the fast kernels against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batchinfer.engine.kernels.attention import TorchPagedAttention
from tests.engine.kernels.batches import Sequences, rope_table


def dense(q, k, v, window, scale):
    """Causal attention of the last ``len(q)`` positions with an explicit mask: ``[tokens, heads, head_dim]``."""
    group = q.shape[1] // k.shape[1]
    key = torch.arange(len(k))
    position = key[-len(q) :, None]
    visible = (key <= position) & (key > position - (window or len(k) + 1))
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=visible, scale=scale).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 7, 20, 1000])
@pytest.mark.parametrize("group", [1, 3])
def test_reference_is_dense_attention(window, group):
    rng = np.random.default_rng(0)
    kv_heads, dim, page = 2, 16, 16
    heads = group * kv_heads
    sequences = Sequences.random(rng, [1, 16, 17, 40, 33], [1, 16, 1, 13, 33], page)
    attention = TorchPagedAttention(heads, kv_heads, dim, page, window, torch.float32, torch.device("cpu"))
    (cache,) = attention.allocate(1, sequences.num_pages)
    cache.fill_(float("nan"))
    table = torch.zeros(64, dim)
    table[:, : dim // 2] = 1  # no rotation
    made = {}
    for name in ("history", "last"):
        batch = getattr(sequences, name)()
        qkv = torch.randn(len(batch.slots), (heads + 2 * kv_heads) * dim)
        q = torch.empty(len(qkv), heads * dim)
        attention.rope_write(qkv, table, batch, cache, None, None, 0.0, q)
        made[name] = qkv
        out = attention.attend(q, batch, cache, torch.full_like(q, float("nan")))
    done = 0
    for s, (context, queries) in enumerate(zip(sequences.contexts, sequences.queries)):
        start = int(sum(sequences.queries[:s]))
        rows = torch.cat((made["history"][done : done + context - queries], made["last"][start : start + queries]))
        done += context - queries
        q, k, v = rows.view(context, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
        expected = dense(q[-queries:], k, v, window, dim**-0.5)
        torch.testing.assert_close(out[start : start + queries].view_as(expected), expected, rtol=1e-5, atol=1e-5)


def test_reference_rotates_halves_as_hugging_face_does():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    dim, tokens = 32, 9
    sequences = Sequences.random(np.random.default_rng(0), [tokens], [tokens], 16)
    attention = TorchPagedAttention(2, 1, dim, 16, None, torch.float32, torch.device("cpu"))
    (cache,) = attention.allocate(1, sequences.num_pages)
    qkv = torch.randn(tokens, 4 * dim)
    q_norm, k_norm = torch.rand(dim), torch.rand(dim)
    batch = sequences.last()
    out = attention.rope_write(qkv, rope_table(dim, 64), batch, cache, q_norm, k_norm, 1e-6, torch.empty(tokens, 2 * dim))
    q, k, v = qkv.view(tokens, 4, dim).split([2, 1, 1], dim=1)
    q, k = F.rms_norm(q, (dim,), q_norm, 1e-6), F.rms_norm(k, (dim,), k_norm, 1e-6)
    cos, sin = rope_table(dim, tokens).chunk(2, dim=-1)
    cos, sin = (torch.cat((x, x), dim=-1)[None] for x in (cos, sin))
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(out.view(tokens, 2, dim), q[0].transpose(0, 1))
    slots = batch.slots.long()
    torch.testing.assert_close(cache[0].flatten(0, 1)[slots], k[0].transpose(0, 1))
    torch.testing.assert_close(cache[1].flatten(0, 1)[slots], v)
