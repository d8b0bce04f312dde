// Head norm, rotary embedding and the write into the cache, one token after another.
#pragma once
#include <algorithm>

#include "paged.h"
#include "team.h"

namespace {

// In float32: optional RMSNorm, then the rotation of (first half, second half).
template <class T>
void rotate(const T* head, const float* cos, const float* norm, float eps, int dim, float* out) {
    const int half = dim / 2;
    const float* sin = cos + half;
    alignas(64) float x[MAX_DIM];
    for (int i = 0; i < dim; ++i) x[i] = to_float(head[i]);
    if (norm) {
        vf squares = {};
        float tail = 0;
        int i = 0;
        for (; i + VL <= dim; i += VL) squares += load<vf>(x + i) * load<vf>(x + i);
        for (; i < dim; ++i) tail += x[i] * x[i];
        float scale = 1.0f / __builtin_sqrtf((sum(squares) + tail) / float(dim) + eps);
        for (i = 0; i < dim; ++i) x[i] = x[i] * scale * norm[i];
    }
    int i = 0;
    for (; i + VL <= half; i += VL) {
        vf a = load<vf>(x + i), b = load<vf>(x + half + i), c = load<vf>(cos + i), s = load<vf>(sin + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

template <class T>
void narrow(const float* from, T* to, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store_float(to + i, load<vf>(from + i));
    for (; i < n; ++i) from_float(to + i, from[i]);
}

template <class T>
void write_key(const T* key, uint32_t* k, int offset, int dim, int page_size) {
    for (int i = 0; i < dim / PAIR<T>; ++i) std::memcpy(k + i * page_size + offset, key + i * PAIR<T>, 4);
}

void write_value(const float* value, uint32_t* v, int offset, int dim, int dim_pad) {
    std::memcpy(v + offset * dim_pad, value, dim * sizeof(float));
}

// Two keys share a lane and may be written by two threads at once: never read, modify and write the lane.
void write_value(const bf16* value, uint32_t* v, int offset, int dim, int dim_pad) {
    uint16_t* to = reinterpret_cast<uint16_t*>(v + offset / 2 * dim_pad) + offset % 2;
    int i = 0;
#if defined(__AVX512BW__)
    const bool odd = offset % 2;
    for (; i + 16 <= dim; i += 16) {
        __m512i lanes = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value + i)));
        if (odd) lanes = _mm512_slli_epi32(lanes, 16);
        _mm512_mask_storeu_epi16(to - odd + 2 * i, odd ? 0xaaaaaaaa : 0x55555555, lanes);
    }
#endif
    for (; i < dim; ++i) to[2 * i] = value[i].bits;
}

INLINE int8_t in_8_bits(float x) { return int8_t(__builtin_rintf(std::min(std::max(x, -127.0f), 127.0f))); }

// A head's key and value to their page, whose K and V begin at `page`.
template <class T>
void write(const Shape& shape, const float* key, const T* value, int offset, T* page) {
    auto* k = reinterpret_cast<uint32_t*>(page);
    alignas(64) T narrowed[MAX_DIM];
    narrow(key, narrowed, shape.dim);
    write_key(narrowed, k, offset, shape.dim, shape.page_size);
    write_value(value, k + shape.k_lanes<T>(), offset, shape.dim, shape.dim_pad());
}

template <class T>
void write(const Shape& shape, const float* key, const T* value, int offset, int8_t* page) {
    int8_t* v = page + shape.k_lanes<T>() * PAIR<T> + offset / PAIR<T> * shape.dim_pad() * PAIR<T> + offset % PAIR<T>;
    for (int i = 0; i < shape.dim; ++i) {
        page[(i / PAIR<T> * shape.page_size + offset) * PAIR<T> + i % PAIR<T>] = in_8_bits(key[i]);
        v[i * PAIR<T>] = in_8_bits(to_float(value[i]));
    }
}

template <class T, class Kept>
void rope_write(const Shape& shape, const T* qkv, const float* cos_sin, const Batch& batch, Kept* cache,
                const float* q_norm, const float* k_norm, float eps, T* q_out, Range tokens) {
    const int heads = shape.heads, kv_heads = shape.kv_heads, dim = shape.dim;
    const int64_t row = int64_t(heads + 2 * kv_heads) * dim;
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        const T* in = qkv + t * row;
        const float* cos = cos_sin + int64_t(batch.positions[t]) * dim;
        const int page = batch.slots[t] / shape.page_size, offset = batch.slots[t] % shape.page_size;
        alignas(64) float rotated[MAX_DIM];
        for (int h = 0; h < heads; ++h) {
            rotate(in + h * dim, cos, q_norm, eps, dim, rotated);
            narrow(rotated, q_out + (t * heads + h) * dim, dim);
        }
        for (int h = 0; h < kv_heads; ++h) {
            rotate(in + (heads + h) * dim, cos, k_norm, eps, dim, rotated);
            write(shape, rotated, in + (heads + kv_heads + h) * dim, offset,
                  cache + (int64_t(page) * kv_heads + h) * shape.head_elements<T>());
        }
    }
}

}  // namespace
