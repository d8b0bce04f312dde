"""Decode over FP8 pages without converting them: keys and values are operands of the tensor cores as they lie.

The products are turned over: keys ``[keys, dim]`` times queries ``[dim, columns]``, values ``[dim, keys]`` times
weights ``[keys, columns]``, so that the 64 rows that a Hopper instruction wants are keys and dimensions, not padding.
Columns there are 16 where a KV head has 8 queries or fewer: each query, and each weight, is two neighbouring columns,
an e4m3 number and what it leaves over in another. Together they are as exact as bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.engine.kernels.gpu.flash import EXPONENT, LARGEST


@triton.jit
def _columns(x):
    """float32 ``[rows, members]`` as e4m3 ``[rows, 2 * members]``: each number, and what is left of it."""
    high = x.to(tl.float8e4nv).to(tl.float32)
    both = tl.reshape(tl.join(high, x - high), [x.shape[0], 2 * x.shape[1]])
    return both.to(tl.float8e4nv)  # last, since the compiler cannot turn a reshape into a layout of shared memory here


@triton.jit
def _members(x):
    """The sums of neighbouring columns, ``[rows, 2 * members]`` to ``[rows, members]``."""
    high, low = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return high + low


@triton.jit
def _visit(
    q, top, total, acc, table, k_cache, v_cache, head, tile, context, scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the running softmax of ``q [dim, 2 * members]``."""
    tl.static_assert(PAGE % BLOCK_N == 0, "a tile lies within a page")
    dim = tl.arange(0, BLOCK_D)
    key = tl.arange(0, BLOCK_N)
    page = tl.load(table + tile * BLOCK_N // PAGE).to(tl.int64)
    within = tile * BLOCK_N % PAGE
    start = (page * KV_HEADS + head) * (PAGE * DIM) + within * DIM
    k_at = k_cache + start + key[:, None] * DIM + dim[None, :]
    v_at = key[None, :] // CHUNK * (DIM * CHUNK) + dim[:, None] * CHUNK + key[None, :] % CHUNK
    v_at = v_cache + start + tl.max_contiguous(tl.multiple_of(v_at, (1, CHUNK)), (1, CHUNK))
    if MASKED:  # an unwritten slot may hold NaN, and NaN * 0 is NaN
        written = tile * BLOCK_N + key < context
        k = tl.load(k_at, mask=written[:, None] & (dim[None, :] < DIM), other=0.0)
        v = tl.load(v_at, mask=written[None, :] & (dim[:, None] < DIM), other=0.0)
    elif DIM == BLOCK_D:
        k = tl.load(k_at)
        v = tl.load(v_at)
    else:
        k = tl.load(k_at, mask=dim[None, :] < DIM, other=0.0)
        v = tl.load(v_at, mask=dim[:, None] < DIM, other=0.0)
    scores = _members(tl.dot(k, q)) * scale[None, :]
    if MASKED:
        if WINDOW:
            written &= tile * BLOCK_N + key >= context - WINDOW
        scores = tl.where(written[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 0))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) - EXPONENT
    weights = tl.exp2(scores - shift[None, :])
    decay = tl.exp2(top - (shift + EXPONENT))
    total = total * decay + tl.sum(weights, 0)
    both = tl.reshape(tl.join(decay, decay), [acc.shape[1]])
    acc = acc * both[None, :] + tl.dot(v, _columns(weights))  # added in float32: sums within FP8 products are coarser
    return new_top, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def decode_fp8(
    q, k_cache, v_cache, table, context_lens, counts, out, partial, partial_lse, scales, scale, table_stride,
    shared, shared_top, shared_total, shared_acc,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SPLITS: tl.constexpr, SHARERS: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As ``flash.decode``, over FP8 pages."""
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens + sequence)
    k_scale, v_scale = tl.load(scales + head), tl.load(scales + KV_HEADS + head)
    if sequence >= tl.load(counts):  # no decode
        return
    member = tl.arange(0, MEMBERS)
    dim = tl.arange(0, BLOCK_D)
    row = (sequence * KV_HEADS + head) * GROUP + member
    mine = (member[None, :] < GROUP) & (dim[:, None] < DIM)
    at = row[None, :] * DIM + dim[:, None]
    queries = tl.load(q + at, mask=mine, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(queries), 0), 1e-30) / 448.0
    columns = _columns(queries / unit[None, :])
    unit *= scale * k_scale
    table += sequence * table_stride

    top = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc = tl.zeros([BLOCK_D, 2 * MEMBERS], tl.float32)
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - WINDOW, 0) // BLOCK_N
    if SHARERS:
        begin = tl.load(shared + sequence // SHARERS) * (PAGE // BLOCK_N)
        if begin > 0 and split == 0:  # the softmax goes on from where the shared pages left it
            top = tl.load(shared_top + row, mask=member < GROUP, other=0.0)
            total = tl.load(shared_total + row, mask=member < GROUP, other=0.0) * LARGEST
            known = tl.load(shared_acc + at, mask=mine, other=0.0) * LARGEST
            acc = tl.reshape(tl.join(known, tl.zeros_like(known)), [BLOCK_D, 2 * MEMBERS])
    end = tl.cdiv(context, BLOCK_N)  # in tiles of keys
    share = tl.cdiv(end - begin, SPLITS)
    begin += split * share
    end = tl.minimum(begin + share, end)
    whole = begin
    if not WINDOW:
        whole = tl.maximum(begin, tl.minimum(end, context // BLOCK_N))
        for keys in tl.range(begin, whole, num_stages=STAGES):
            top, total, acc = _visit(
                columns, top, total, acc, table, k_cache, v_cache, head, keys, context, unit,
                KV_HEADS, DIM, PAGE, WINDOW, CHUNK, False, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    for keys in tl.range(whole, end, num_stages=1):
        top, total, acc = _visit(
            columns, top, total, acc, table, k_cache, v_cache, head, keys, context, unit,
            KV_HEADS, DIM, PAGE, WINDOW, CHUNK, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    some = tl.where(total > 0, total, 1.0)
    result = _members(acc) * (v_scale / some)[None, :]
    if SPLITS == 1:
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mine)
    else:
        place = row * SPLITS + split
        tl.store(partial + place[None, :] * DIM + dim[:, None], result, mask=mine)
        tl.store(partial_lse + place, tl.where(total > 0, top + tl.log2(some), float("-inf")), mask=member < GROUP)
