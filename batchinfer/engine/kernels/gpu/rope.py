"""Rotary position embedding in Triton, and what it leads to: keys and values into their pages."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half(qkv, at, mask, row_scale, columns, SCALE: tl.constexpr):
    """Numbers of a product, times their scales where these are not in it yet."""
    x = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        x *= row_scale * tl.load(columns + at, mask=mask, other=0.0)
    return x


@triton.jit
def _turn(first, second, norm, cos, sin, eps, low, half: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr):
    """RMSNorm over each head where asked, then the rotation; ``first`` and ``second`` are the halves of the heads."""
    if NORM:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half)
        inverse = tl.rsqrt(mean + eps)[:, None]
        weight = tl.load(norm + low, mask=low < half, other=0.0)[None, :]
        first = first * inverse * weight
        weight = tl.load(norm + half + low, mask=low < half, other=0.0)[None, :]
        second = second * inverse * weight
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rope_write(
    qkv, rows, columns, cos_sin, positions, slots, counts, k_cache, v_cache, q_norm, k_norm, scales, eps, q_out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    CHUNK: tl.constexpr, NORM: tl.constexpr, FP8: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One token, all its heads; FP8 values of prompts are left to ``write_values``."""
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    low = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    cos = tl.load(cos_sin + position * DIM + low, mask=low < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin + position * DIM + HALF + low, mask=low < HALF, other=0.0)[None, :]
    qkv += token * (HEADS + 2 * KV_HEADS) * DIM
    row_scale = 1.0
    if SCALE:
        row_scale = tl.load(rows + token)

    heads = tl.arange(0, BLOCK_H)
    mask = (heads[:, None] < HEADS) & (low[None, :] < HALF)
    at = heads[:, None] * DIM + low[None, :]
    first = _half(qkv, at, mask, row_scale, columns, SCALE)
    second = _half(qkv, HALF + at, mask, row_scale, columns, SCALE)
    first, second = _turn(first, second, q_norm, cos, sin, eps, low, HALF, NORM, BLOCK_H)
    q_out += token * HEADS * DIM
    tl.store(q_out + at, first.to(q_out.dtype.element_ty), mask=mask)
    tl.store(q_out + HALF + at, second.to(q_out.dtype.element_ty), mask=mask)
    if slot < 0:  # padding
        return

    heads = tl.arange(0, BLOCK_KV)
    mask = (heads[:, None] < KV_HEADS) & (low[None, :] < HALF)
    at = (HEADS + heads[:, None]) * DIM + low[None, :]
    first = _half(qkv, at, mask, row_scale, columns, SCALE)
    second = _half(qkv, HALF + at, mask, row_scale, columns, SCALE)
    first, second = _turn(first, second, k_norm, cos, sin, eps, low, HALF, NORM, BLOCK_KV)
    if FP8:
        k_scale = tl.load(scales + heads, mask=heads < KV_HEADS, other=1.0)[:, None]
        first, second = _saturate(first / k_scale), _saturate(second / k_scale)
    page, within = (slot // PAGE).to(tl.int64), slot % PAGE
    to = (page * KV_HEADS + heads[:, None]) * (PAGE * DIM) + within * DIM + low[None, :]
    tl.store(k_cache + to, first.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(k_cache + HALF + to, second.to(k_cache.dtype.element_ty), mask=mask)
    at += KV_HEADS * DIM
    if not FP8:
        first = _half(qkv, at, mask, row_scale, columns, SCALE)
        second = _half(qkv, HALF + at, mask, row_scale, columns, SCALE)
        tl.store(v_cache + to, first.to(v_cache.dtype.element_ty), mask=mask)
        tl.store(v_cache + HALF + to, second.to(v_cache.dtype.element_ty), mask=mask)
    elif token < tl.load(counts):
        v_scale = tl.load(scales + KV_HEADS + heads, mask=heads < KV_HEADS, other=1.0)[:, None]
        first = _saturate(_half(qkv, at, mask, row_scale, columns, SCALE) / v_scale)
        second = _saturate(_half(qkv, HALF + at, mask, row_scale, columns, SCALE) / v_scale)
        to = (page * KV_HEADS + heads[:, None]) * (PAGE * DIM) + within // CHUNK * (DIM * CHUNK) + within % CHUNK
        to += low[None, :] * CHUNK
        tl.store(v_cache + to, first.to(v_cache.dtype.element_ty), mask=mask)
        tl.store(v_cache + HALF * CHUNK + to, second.to(v_cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def write_values(
    qkv, rows, columns, slots, counts, v_cache, scales, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """FP8 values of CHUNK tokens and one KV head into their pages, where a prompt's tokens are neighbours.

    Those of decodes, each a page of its own, have been written.
    """
    token, dim = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    head = tl.program_id(1)
    slot = tl.load(slots + token, mask=(token >= tl.load(counts)) & (token < tokens), other=-1)
    mask = (slot >= 0)[:, None] & (dim[None, :] < DIM)
    channel = (HEADS + KV_HEADS + head) * DIM + dim[None, :]
    at = token[:, None] * ((HEADS + 2 * KV_HEADS) * DIM) + channel
    values = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        values *= tl.load(rows + token, mask=slot >= 0, other=0.0)[:, None]
        values *= tl.load(columns + channel, mask=dim[None, :] < DIM, other=0.0)
    values = _saturate(values / tl.load(scales + KV_HEADS + head))
    page, within = (slot // PAGE).to(tl.int64), slot % PAGE
    start = (page * KV_HEADS + head) * (PAGE * DIM) + within // CHUNK * (DIM * CHUNK) + within % CHUNK
    # Tokens are the first axis, the one that a warp's threads run along: what they store together is side by side.
    tl.store(v_cache + start[:, None] + dim[None, :] * CHUNK, values.to(v_cache.dtype.element_ty), mask=mask)


@triton.jit
def _saturate(x):
    return tl.clamp(x.to(tl.float32), -448.0, 448.0)
