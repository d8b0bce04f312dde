"""Paged attention: the reference against torch's own attention, the fast kernels against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batchinfer.engine.kernels.attention import SHARERS, TorchPagedAttention, shared_pages
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
    out = attention.rope_write(
        qkv, rope_table(dim, 64), batch, cache, q_norm, k_norm, 1e-6, torch.empty(tokens, 2 * dim)
    )
    q, k, v = qkv.view(tokens, 4, dim).split([2, 1, 1], dim=1)
    q, k = F.rms_norm(q, (dim,), q_norm, 1e-6), F.rms_norm(k, (dim,), k_norm, 1e-6)
    cos, sin = rope_table(dim, tokens).chunk(2, dim=-1)
    cos, sin = (torch.cat((x, x), dim=-1)[None] for x in (cos, sin))
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(out.view(tokens, 2, dim), q[0].transpose(0, 1))
    slots = batch.slots.long()
    torch.testing.assert_close(cache[0].flatten(0, 1)[slots], k[0].transpose(0, 1))
    torch.testing.assert_close(cache[1].flatten(0, 1)[slots], v)


class Pair:
    """The fast attention and the reference, fed the same rows; memory is poisoned before anything is written."""

    def __init__(self, kernels, heads, kv_heads, dim, page_size, window, dtype, norm=False, kv_dtype=None):
        shape = (heads, kv_heads, dim, page_size, window)
        device = torch.get_default_device()
        self.fast = kernels.attention(*shape, dtype, device, kv_dtype)
        self.reference = TorchPagedAttention(*shape, torch.float32, device, kv_dtype)
        self.width, self.q_width = (heads + 2 * kv_heads) * dim, heads * dim
        self.dtype = dtype
        self.table = rope_table(dim, 4096)
        self.norms = [torch.rand(dim) + 0.5, torch.rand(dim) + 0.5] if norm else [None, None]

    def allocate(self, sequences):
        (self.fast_cache,) = self.fast.allocate(1, sequences.num_pages)
        assert self.fast_cache.nbytes == self.fast.page_bytes(1) * sequences.num_pages
        self.fast_cache.view(torch.uint8).fill_(0xFF)  # NaN, whatever the element
        (self.reference_cache,) = self.reference.allocate(1, sequences.num_pages)
        self.reference_cache.fill_(float("nan") if self.reference_cache.is_floating_point() else -1)

    def step(self, batch, qkv):
        """(fast, reference) outputs."""
        results = []
        for attention, cache in ((self.fast, self.fast_cache), (self.reference, self.reference_cache)):
            q = torch.full((len(qkv), self.q_width), float("nan"), dtype=attention.dtype)
            out = torch.full_like(q, float("nan"))
            attention.rope_write(qkv.to(attention.dtype), self.table, batch, cache, *self.norms, 1e-6, q)
            results.append(attention.attend(q, batch, cache, out).float())
        return results

    def random_qkv(self, batch):
        return torch.randn(len(batch.slots), self.width).to(self.dtype).float()


SHAPES = [  # heads, kv_heads, head_dim
    (9, 3, 64), (4, 4, 16), (8, 1, 32), (6, 2, 48), (5, 1, 80), (14, 2, 96), (8, 4, 128), (2, 1, 256), (7, 1, 18),
    (24, 2, 20), (3, 3, 2), (2, 2, 100),
]  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_attention_is_the_reference(kernels, dtype, tolerance, shape, window):
    rng = np.random.default_rng([*shape, window or 0])
    torch.manual_seed(0)
    for page_size in (16, 32):
        pair = Pair(kernels, *shape, page_size, window, dtype, norm=page_size == 32)
        contexts = [1, 2, 15, 16, 17, 33, 255, 256, 257, 600, *rng.integers(1, 700, 4).tolist()]
        queries = [1, 2, 1, 16, 1, 9, 255, 1, 2, 1, *(int(rng.integers(1, c + 1)) for c in contexts[10:])]
        sequences = Sequences.random(rng, contexts, queries, page_size)
        pair.allocate(sequences)
        for batch in (sequences.history(), sequences.last()):
            fast, reference = pair.step(batch, pair.random_qkv(batch))
            torch.testing.assert_close(fast, reference, **tolerance)


def test_keys_and_values_in_8_bits_are_those_of_the_reference(kernels, dtype):
    if kernels.name == "gpu":
        pytest.skip("GPUs keep them in FP8")
    torch.manual_seed(0)
    for shape in ((6, 2, 64), (4, 4, 16), (7, 1, 18)):
        pair = Pair(kernels, *shape, 16, None, dtype, kv_dtype=torch.int8)
        sequences = Sequences.random(np.random.default_rng(0), [1, 17, 600, 300, 40], [1, 1, 1, 290, 9], 16)
        pair.allocate(sequences)
        assert pair.fast.page_bytes(1) <= 2 * pair.reference.page_bytes(1)  # whole vectors of dimensions
        for batch in (sequences.history(), sequences.last()):
            qkv = pair.random_qkv(batch)
            qkv[:, : pair.q_width] /= 30
            qkv[:, pair.q_width :] *= 50  # some are cut off
            fast, reference = pair.step(batch, qkv.to(dtype).float())
            torch.testing.assert_close(fast, reference, rtol=0.02, atol=0.5)


def test_sequences_of_one_row_need_not_be_told_apart(kernels, dtype, tolerance):
    pair = Pair(kernels, 6, 2, 64, 16, None, dtype)
    sequences = Sequences.random(np.random.default_rng(0), [40, 17, 33], [1, 1, 20], 16)
    pair.allocate(sequences)
    history = sequences.history()
    pair.step(history, pair.random_qkv(history))
    batch = dataclasses.replace(sequences.last(), decodes=0, prefills=0, counts=None)
    torch.testing.assert_close(*pair.step(batch, pair.random_qkv(batch)), **tolerance)


def test_sequences_may_share_pages(kernels, dtype, tolerance):
    pair = Pair(kernels, 6, 2, 64, 16, None, dtype)
    sequences = Sequences.random(np.random.default_rng(0), [40, 45, 33], [8, 13, 1], 16)
    for pages in sequences.pages[1:]:
        pages[:2] = sequences.pages[0][:2]
    pair.allocate(sequences)
    prefix = sequences.step([0, 0, 0], [32, 0, 0])
    pair.step(prefix, pair.random_qkv(prefix))
    batch = sequences.step([32, 32, 32], [40, 45, 33])
    torch.testing.assert_close(*pair.step(batch, pair.random_qkv(batch)), **tolerance)


def share(sequences, groups):
    """Give the sequences of each group the first pages of the group's first; what was written there is theirs too."""
    for group, pages in groups:
        for s in group[1:]:
            sequences.pages[s][:pages] = sequences.pages[group[0]][:pages]


def test_neighbours_that_begin_alike_are_found_by_their_pages():
    table = np.random.default_rng(0).permutation(2 * SHARERS * 5 + 20).reshape(-1, 5).astype(np.int32)
    contexts = np.full(len(table), 80)
    assert shared_pages(table, contexts, 16).tolist() == [0, 0, 0]
    table[:, :3] = table[0, :3]
    assert shared_pages(table, contexts, 16).tolist() == [3, 3, 0]  # four neighbours are too few
    contexts[5] = 47
    table[40, 0] = 7
    assert shared_pages(table, contexts, 16).tolist() == [2, 0, 0]  # one does not see all of the third


@pytest.mark.parametrize("shape", [(6, 2, 64), (8, 1, 32), (3, 3, 16)], ids=str)
def test_decodes_that_share_pages_are_attended_together(kernels, dtype, tolerance, shape):
    pair = Pair(kernels, *shape, 16, None, dtype)
    rng = np.random.default_rng(0)
    contexts = rng.integers(49, 90, SHARERS + 11).tolist()
    sequences = Sequences.random(rng, [*contexts, 20], [1] * len(contexts) + [3], 16)
    share(sequences, [(range(SHARERS), 3), (range(SHARERS, len(contexts)), 2)])
    pair.allocate(sequences)
    history, last = sequences.history(), sequences.last()
    assert last.shared.tolist() == [3, 2]
    qkv = pair.random_qkv(history)  # of shared pages every sequence writes its own: make them the same
    starts = history.query_starts.tolist()
    for s in range(len(contexts)):
        first, pages = (0, 3) if s < SHARERS else (SHARERS, 2)
        qkv[starts[s] : starts[s] + 16 * pages] = qkv[starts[first] : starts[first] + 16 * pages]
    pair.step(history, qkv)
    torch.testing.assert_close(*pair.step(last, pair.random_qkv(last)), **tolerance)


@pytest.mark.parametrize(("window", "kv_dtype"), [(None, None), (100, None), (100, torch.int8)])
def test_a_row_does_not_depend_on_its_batch_nor_on_the_threads(kernels, dtype, window, kv_dtype):
    if kernels.name == "gpu":
        pytest.skip("keys are cut into as many parts as fill the card: sums differ by rounding")
    pair = Pair(kernels, 9, 3, 64, 16, window, dtype, kv_dtype=kv_dtype)
    contexts, queries = [900, 130, 257, 40], [1, 60, 257, 1]
    sequences = Sequences.random(np.random.default_rng(0), contexts, queries, 16)
    pair.allocate(sequences)
    history, last = sequences.history(), sequences.last()
    pair.step(history, pair.random_qkv(history))
    q = torch.randn(len(last.slots), pair.q_width).to(dtype)
    pair.step(last, pair.random_qkv(last))
    threads = torch.get_num_threads()
    together = pair.fast.attend(q, last, pair.fast_cache, torch.empty_like(q))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(pair.fast.attend(q, last, pair.fast_cache, torch.empty_like(q)), together)
            for s, (context, rows) in enumerate(zip(contexts, queries)):
                start = sum(queries[:s])
                for first, end in {(0, rows), (0, 1), (rows // 2, rows)}:
                    batch = sequences.step(
                        [context - rows + first if t == s else 0 for t in range(4)],
                        [context - rows + end if t == s else 0 for t in range(4)],
                    )
                    some = q[start + first : start + end].contiguous()
                    alone = pair.fast.attend(some, batch, pair.fast_cache, torch.empty_like(some))
                    assert torch.equal(alone, together[start + first : start + end])
    finally:
        torch.set_num_threads(threads)


def test_pages_behind_the_window_are_not_read(kernels, dtype):
    pair = Pair(kernels, 4, 2, 32, 16, 20, dtype)
    sequences = Sequences.random(np.random.default_rng(0), [90], [1], 16)
    pair.allocate(sequences)
    history, last = sequences.history(), sequences.last()
    pair.step(history, pair.random_qkv(history))
    qkv = pair.random_qkv(last)
    expected, _ = pair.step(last, qkv)
    last.page_table[0, :4] = 2**30
    assert torch.equal(pair.step(last, qkv)[0], expected)


def test_wrong_shapes_are_refused(kernels, dtype):
    for shape, message in [((3, 2, 64, 16, None), "multiple"), ((2, 2, 63, 16, None), "even"),
                           ((2, 2, 64, 16, 0), "window"), ((2, 2, 64, 24, None), "page_size"),
                           ((2, 2, 514, 16, None), "head_dim")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            kernels.attention(*shape, dtype, torch.device("cpu"))
