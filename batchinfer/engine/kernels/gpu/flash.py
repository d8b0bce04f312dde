"""FlashAttention over pages in Triton: prefill over tiles of queries, decode over splits of a sequence's keys.

And the pages that neighbouring decodes share, once for all of them.

All query heads of a KV head share a tile (GQA packing), so that each key and value is read once. A cache is
``[2, pages, kv_heads, page_size * head_dim]``, keys first; a head of a page is one contiguous run of memory. Keys lie
token by token. Values too, unless they are FP8: a tensor core wants neighbours along the tokens, and no instruction
transposes bytes on their way to it. So FP8 values lie in chunks of CHUNK tokens, ``[chunk, head_dim, CHUNK]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT = tl.constexpr(8)  # FP8 weights are up to 2**8, so that the smaller ones do not vanish in e4m3
LARGEST = tl.constexpr(2.0**8)
LEAST = tl.constexpr(1e-20)  # of what queries are scaled by, for rows of zeros


@triton.jit
def _visit(
    q, top, total, acc, table, k_cache, v_cache, head, tile, context, position, scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the running softmax of ``q [rows, dim]`` (arXiv:2205.14135).

    Scores are products times ``scale [rows]``. Where not MASKED every key is visible to every row. Where ``q`` is FP8
    so are the keys, the values and the weights, which are up to 2**EXPONENT then, and so is what they add up to.
    """
    tl.static_assert(PAGE % BLOCK_N == 0, "a tile lies within a page")
    dim = tl.arange(0, BLOCK_D)
    key = tl.arange(0, BLOCK_N)
    page = tl.load(table + tile * BLOCK_N // PAGE).to(tl.int64)
    within = tile * BLOCK_N % PAGE
    start = (page * KV_HEADS + head) * (PAGE * DIM) + within * DIM
    position -= tile * BLOCK_N
    k_at = k_cache + start + key[None, :] * DIM + dim[:, None]  # transposed: [dim, keys]
    if DIM == BLOCK_D:
        k = tl.load(k_at)
    else:
        k = tl.load(k_at, mask=dim[:, None] < DIM, other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen no key yet
    decay = tl.exp2(top - shift)
    if q.dtype == tl.float8e4nv:
        shift -= EXPONENT
    weights = tl.exp2(scores * scale[:, None] - shift[:, None])
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    written = tile * BLOCK_N + key < context  # other slots may hold NaN, and NaN * 0 is NaN
    if TRANSPOSED:
        at = key[None, :] // CHUNK * (DIM * CHUNK) + dim[:, None] * CHUNK + key[None, :] % CHUNK
        at = tl.max_contiguous(tl.multiple_of(at, (1, CHUNK)), (1, CHUNK))  # the compiler does not see it by itself
        if DIM == BLOCK_D:
            v = tl.load(v_cache + start + at)
        else:
            v = tl.load(v_cache + start + at, mask=dim[:, None] < DIM, other=0.0)
        if MASKED:
            v = tl.where(written[None, :], v.to(tl.float32), 0.0)
        v = tl.trans(v.to(q.dtype))
    else:
        v_at = v_cache + start + key[:, None] * DIM + dim[None, :]
        if MASKED:
            v = tl.load(v_at, mask=written[:, None] & (dim[None, :] < DIM), other=0.0)
        elif DIM == BLOCK_D:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=dim[None, :] < DIM, other=0.0)
        v = v.to(q.dtype)
    acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def decode(
    q, k_cache, v_cache, table, context_lens, counts, out, partial, partial_lse, scales, scale, table_stride,
    shared, shared_top, shared_total, shared_acc,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, SHARERS: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One query token of one sequence: program (sequence, KV head, split of its keys).

    With SHARERS, the first ``shared[sequence // SHARERS]`` pages have been visited by ``prefix``.
    """
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens + sequence)
    k_scale, v_scale = tl.load(scales + head), tl.load(scales + KV_HEADS + head)
    if sequence >= tl.load(counts):  # no decode
        return
    member = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    mine = (member[:, None] < GROUP) & (dim[None, :] < DIM)
    row = (sequence * KV_HEADS + head) * GROUP + member
    at = row[:, None] * DIM + dim[None, :]
    query = tl.load(q + at, mask=mine, other=0.0).to(COMPUTE)
    table += sequence * table_stride
    scale = tl.full([BLOCK_M], scale * k_scale, tl.float32)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - WINDOW, 0) // BLOCK_N
    if SHARERS:
        begin = tl.load(shared + sequence // SHARERS) * (PAGE // BLOCK_N)
        if begin > 0 and split == 0:  # the softmax goes on from where the shared pages left it
            top = tl.load(shared_top + row, mask=member < GROUP, other=0.0)
            total = tl.load(shared_total + row, mask=member < GROUP, other=0.0)
            acc = tl.load(shared_acc + at, mask=mine, other=0.0)
    end = tl.cdiv(context, BLOCK_N)  # in tiles of keys
    share = tl.cdiv(end - begin, SPLITS)
    begin += split * share
    end = tl.minimum(begin + share, end)
    position = tl.zeros([BLOCK_M], tl.int32) + (context - 1)
    whole = begin
    if not WINDOW:
        whole = tl.maximum(begin, tl.minimum(end, context // BLOCK_N))
        for keys in tl.range(begin, whole, num_stages=STAGES):
            top, total, acc = _visit(
                query, top, total, acc, table, k_cache, v_cache, head, keys, context, position, scale,
                KV_HEADS, DIM, PAGE, WINDOW, TRANSPOSED, CHUNK, False, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    for keys in tl.range(whole, end, num_stages=1):
        top, total, acc = _visit(
            query, top, total, acc, table, k_cache, v_cache, head, keys, context, position, scale,
            KV_HEADS, DIM, PAGE, WINDOW, TRANSPOSED, CHUNK, True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    some = tl.where(total > 0, total, 1.0)
    acc = acc * (v_scale / some)[:, None]
    if SPLITS == 1:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mine)
    else:
        place = row * SPLITS + split
        tl.store(partial + place[:, None] * DIM + dim[None, :], acc, mask=mine)
        tl.store(partial_lse + place, tl.where(total > 0, top + tl.log2(some), float("-inf")), mask=member < GROUP)


@triton.jit
def merge(
    partial, partial_lse, counts, out,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The splits of one query head, weighed by their softmax totals."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if sequence >= tl.load(counts):
        return
    split, dim = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    place = (sequence * HEADS + head) * SPLITS + split
    lse = tl.load(partial_lse + place, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    mask = (split[:, None] < SPLITS) & (weight[:, None] > 0) & (dim[None, :] < DIM)
    values = tl.load(partial + place[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    merged = tl.sum(values * weight[:, None], 0)
    tl.store(out + (sequence * HEADS + head) * DIM + dim, merged.to(out.dtype.element_ty), mask=dim < DIM)


@triton.jit(do_not_specialize=["table_stride"])
def prefix(
    q, k_cache, v_cache, table, counts, scales, scale, table_stride, shared, shared_top, shared_total, shared_acc,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr, SHARERS: tl.constexpr, COMPUTE: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pages that SHARERS neighbouring decodes all begin with, for QUERIES of them: program (tile, KV head).

    Their softmax so far is left for ``decode`` to go on from: float32, values not scaled yet.
    """
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1)
    pages = tl.load(shared + first // SHARERS)
    if pages == 0:
        return
    member = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    sequence = first + member // GROUP
    here = (member < QUERIES * GROUP) & (sequence < tl.load(counts))
    row = (sequence.to(tl.int64) * KV_HEADS + head) * GROUP + member % GROUP
    mine = here[:, None] & (dim[None, :] < DIM)
    at = row[:, None] * DIM + dim[None, :]
    queries = tl.load(q + at, mask=mine, other=0.0).to(COMPUTE)
    table += first.to(tl.int64) * table_stride
    scale = tl.full([BLOCK_M], scale * tl.load(scales + head), tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for keys in tl.range(0, pages * (PAGE // BLOCK_N), num_stages=STAGES):
        top, total, acc = _visit(
            queries, top, total, acc, table, k_cache, v_cache, head, keys, 0, member, scale,
            KV_HEADS, DIM, PAGE, 0, TRANSPOSED, CHUNK, False, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    tl.store(shared_top + row, top, mask=here)
    tl.store(shared_total + row, total, mask=here)
    tl.store(shared_acc + at, acc, mask=mine)


@triton.jit(do_not_specialize=["table_stride"])
def prefill(
    q, k_cache, v_cache, table, query_starts, context_lens, counts, out, scales, scale, table_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of neighbouring queries of one sequence, all heads of one KV head: program (tile, KV head).

    Where COMPUTE is FP8, a query is its e4m3 numbers and a scale.
    Each sequence has room for one tile more than its queries may need, so that its first tile is found without a list.
    """
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile, head = tl.program_id(0), tl.program_id(1)
    first, sequences = tl.load(counts), tl.load(counts + 1)
    origin = tl.load(query_starts + first)
    if tile >= (tl.load(query_starts + sequences) - origin) // QUERIES + sequences - first:
        return
    low, high = first, sequences  # the last sequence whose first tile is not after this one
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(query_starts + middle) - origin) // QUERIES + middle - first <= tile:
            low = middle
        else:
            high = middle
    sequence = low
    start, stop = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    query = (tile - ((start - origin) // QUERIES + sequence - first)) * QUERIES
    if query >= stop - start:
        return
    context = tl.load(context_lens + sequence)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = query + row // GROUP
    position = context - (stop - start) + token
    mine = ((token < stop - start) & (row < QUERIES * GROUP))[:, None] & (dim[None, :] < DIM)
    base = ((start + query).to(tl.int64) * KV_HEADS + head) * (GROUP * DIM)
    at = (row // GROUP * (KV_HEADS * GROUP) + row % GROUP)[:, None] * DIM + dim[None, :]  # 32 bits: half the registers
    queries = tl.load(q + base + at, mask=mine, other=0.0)
    table += sequence.to(tl.int64) * table_stride
    k_scale, v_scale = tl.load(scales + head), tl.load(scales + KV_HEADS + head)
    scale = tl.full([BLOCK_M], scale * k_scale, tl.float32)
    if COMPUTE == tl.float8e4nv:  # noqa: SIM300
        largest = tl.maximum(tl.max(tl.abs(queries.to(tl.float32)), 1), LEAST) / 448.0
        queries = queries.to(tl.float32) / largest[:, None]
        scale *= largest
    queries = queries.to(COMPUTE)

    earliest = context - (stop - start) + query  # position of the tile's first query
    latest = tl.minimum(earliest + QUERIES, context)  # keys that the tile's last query sees
    begin = 0
    if WINDOW:
        begin = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = begin
    if not WINDOW:
        whole = (earliest + 1) // BLOCK_N
        for keys in tl.range(begin, whole, num_stages=STAGES):
            top, total, acc = _visit(
                queries, top, total, acc, table, k_cache, v_cache, head, keys, context, position, scale,
                KV_HEADS, DIM, PAGE, WINDOW, TRANSPOSED, CHUNK, False, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    for keys in tl.range(whole, tl.cdiv(latest, BLOCK_N), num_stages=2):
        top, total, acc = _visit(
            queries, top, total, acc, table, k_cache, v_cache, head, keys, context, position, scale,
            KV_HEADS, DIM, PAGE, WINDOW, TRANSPOSED, CHUNK, True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    acc = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(out + base + at, acc.to(out.dtype.element_ty), mask=mine)
