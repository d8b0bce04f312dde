// Products with quantised weights, y = x @ weight.T + bias. Weights lie in blocks of 16 output channels, in the order in
// which the dot-product instructions take them; they are read as they are kept, never widened beyond one tile.
#include <algorithm>
#include <vector>

#include "simd.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
namespace {

constexpr int WIDE = 2;      // blocks of 16 channels that a tile spans
constexpr int TALL = 12;     // rows of a tile: 24 sums, 2 weights and an activation fit the 32 registers
constexpr int CHANNELS = 16;

INLINE __m512i dot(__m512i sum, __m512i weights, const uint8_t* x) {  // 4 unsigned bytes with 4 signed ones, a lane
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(load<int32_t>(x)), weights);
}
INLINE __m512 dot(__m512 sum, __m512i weights, const bf16* x) {  // 2 numbers a lane
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(load<int32_t>(x)));
}

// One tile: R rows of x against up to WIDE blocks. `block` is the distance between blocks, `steps` the lanes of a row.
template <int R, class Sum, class X>
INLINE void tile(const X* x, int64_t stride, const uint8_t* weights, int64_t block, int wide, int64_t steps,
                 Sum (*sums)[WIDE]) {
    constexpr int LANE = 4 / sizeof(X);
    Sum acc[R][WIDE] = {};
    const uint8_t* second = wide > 1 ? weights + block : weights;
    for (int64_t k = 0; k < steps; ++k) {
        const __m512i w[WIDE] = {_mm512_loadu_si512(weights + k * 64), _mm512_loadu_si512(second + k * 64)};
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < WIDE; ++c) acc[r][c] = dot(acc[r][c], w[c], x + r * stride + k * LANE);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < WIDE; ++c) sums[r][c] = acc[r][c];
}

template <class Sum, class X, int R = TALL>
INLINE void tile_of(int rows, const X* x, int64_t stride, const uint8_t* weights, int64_t block, int wide,
                    int64_t steps, Sum (*sums)[WIDE]) {
    if (rows == R)
        tile<R>(x, stride, weights, block, wide, steps, sums);
    else if constexpr (R > 1)
        tile_of<Sum, X, R - 1>(rows, x, stride, weights, block, wide, steps, sums);
}

// Calls work(first, count) for rows in tiles as even as can be.
template <class Work>
INLINE void in_tiles(int64_t begin, int64_t end, Work work) {
    const int64_t count = end - begin, tiles = (count + TALL - 1) / TALL;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = begin + count * t / tiles;
        work(first, int(begin + count * (t + 1) / tiles - first));
    }
}

template <class T>
INLINE void finish(__m512 y, const T* bias, T* to, int64_t channels) {
    if (channels >= CHANNELS) {
        vf out = (vf)y;
        if (bias) out += load_float(bias);
        store_float(to, out);
    } else {
        for (int64_t i = 0; i < channels; ++i) from_float(to + i, y[i] + (bias ? to_float(bias[i]) : 0.0f));
    }
}

// ---- W8A8: activations to 8 bits, a scale a row

// x / scale + 128, so that 0 becomes 128; returns the scale. Where something is not finite, the scale is NaN.
template <class T>
float quantize_row(const T* x, int64_t n, uint8_t* to, int64_t padded) {
    vf most = {};
    __mmask16 nan = 0;
    float top = 0;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        const vf v = load_float(x + i);
        nan |= _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
        most = max((vf)_mm512_abs_ps((__m512)v), most);
    }
    for (; i < n; ++i) {
        const float v = to_float(x[i]);
        nan |= v != v;
        top = std::max(top, __builtin_fabsf(v));
    }
    top = std::max(top, largest(most));
    const float scale = nan || top > 3.4e38f ? __builtin_nanf("") : top / 127.0f;
    const float inverse = top > 0 && scale == scale ? 127.0f / top : 0.0f;
    for (i = 0; i + VL <= n; i += VL) {
        const __m512i q = _mm512_cvtps_epi32((__m512)(load_float(x + i) * inverse));
        _mm_storeu_si128((__m128i*)(to + i),
                         _mm_xor_si128(_mm512_cvtsepi32_epi8(q), _mm_set1_epi8(char(0x80))));
    }
    for (; i < n; ++i) to[i] = uint8_t(128 + int(__builtin_rintf(to_float(x[i]) * inverse)));
    for (; i < padded; ++i) to[i] = 128;
    return scale;
}

template <class T>
void linear_w8a8(const T* x, const uint8_t* weights, const float* scale, const int32_t* offset, const T* bias, T* y,
                 int64_t rows, int64_t n, int64_t k, int threads) {
    static thread_local std::vector<uint8_t> codes;
    static thread_local std::vector<float> scales;
    const int64_t steps = (k + 3) / 4, padded = steps * 4, blocks = (n + CHANNELS - 1) / CHANNELS;
    codes.resize(rows * padded);
    scales.resize(rows);
    uint8_t* const q = codes.data();
    float* const row_scale = scales.data();
    const int64_t spans = (blocks + WIDE - 1) / WIDE;
#pragma omp parallel num_threads(threads) if (rows * n * k > 1 << 18)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) row_scale[r] = quantize_row(x + r * k, k, q + r * padded, padded);
#pragma omp for schedule(static)
        for (int64_t span = 0; span < spans; ++span) {
            const int64_t b = span * WIDE;
            const int wide = int(std::min<int64_t>(WIDE, blocks - b));
            in_tiles(0, rows, [&](int64_t first, int count) {
                __m512i sums[TALL][WIDE];
                tile_of<__m512i>(count, q + first * padded, padded, weights + b * steps * 64, steps * 64, wide, steps,
                                 sums);
                for (int r = 0; r < count; ++r)
                    for (int c = 0; c < wide; ++c) {
                        const int64_t channel = (b + c) * CHANNELS;
                        const __m512i exact = _mm512_sub_epi32(sums[r][c], _mm512_loadu_si512(offset + channel));
                        const vf value = (vf)_mm512_cvtepi32_ps(exact) * load<vf>(scale + channel) * row_scale[first + r];
                        finish((__m512)value, bias ? bias + channel : nullptr, y + (first + r) * n + channel,
                               n - channel);
                    }
            });
        }
    }
}

// ---- weights alone are quantised: a tile of them becomes bfloat16, for as many rows as there are

enum Form { INT8 = 0, INT4 = 1, FP8 = 2 };

INLINE __m512i paired(__m512 low, __m512 high) {  // bf16 of both, lane by lane
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
}

INLINE __m512i int8_lane(__m256i raw) {  // 16 channels, 2 numbers each
    const __m512i pair = _mm512_cvtepu16_epi32(raw);
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(pair, 24), 24);
    const __m512i high = _mm512_srai_epi32(_mm512_slli_epi32(pair, 16), 24);
    return paired(_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high));
}

INLINE __m512 e4m3(__m512i low_byte) {  // exponent and mantissa moved into a float's, then the difference of biases
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(low_byte, _mm512_set1_epi32(0x80)), 24);
    const __m512i rest = _mm512_slli_epi32(_mm512_and_si512(low_byte, _mm512_set1_epi32(0x7f)), 20);
    const __m512 value = _mm512_mul_ps((__m512)rest, _mm512_set1_ps(0x1p120f));
    return (__m512)_mm512_or_si512(sign, (__m512i)value);
}

INLINE __m512i fp8_lane(__m256i raw) {
    const __m512i pair = _mm512_cvtepu16_epi32(raw);
    return paired(e4m3(pair), e4m3(_mm512_srli_epi32(pair, 8)));
}

INLINE __m512i int4_lane(__m128i raw, __m512 scale, __m512 zero) {
    const __m512i byte = _mm512_cvtepu8_epi32(raw), mask = _mm512_set1_epi32(15);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_and_si512(byte, mask));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_srli_epi32(byte, 4));
    return paired(_mm512_mul_ps(_mm512_sub_ps(low, zero), scale), _mm512_mul_ps(_mm512_sub_ps(high, zero), scale));
}

// One block of 16 channels, all of K.
template <Form F>
void widen(const uint8_t* codes, const float* scale, const float* zero, int64_t steps, int64_t group, __m512i* to) {
    if constexpr (F == INT4) {
        for (int64_t k = 0, g = 0; k < steps; k += group, ++g) {
            const __m512 s = _mm512_loadu_ps(scale + g * CHANNELS), z = _mm512_loadu_ps(zero + g * CHANNELS);
            const int64_t end = std::min(steps, k + group);
            for (int64_t i = k; i < end; ++i)
                to[i] = int4_lane(_mm_loadu_si128((const __m128i*)(codes + i * CHANNELS)), s, z);
        }
    } else {
        for (int64_t i = 0; i < steps; ++i) {
            const __m256i raw = _mm256_loadu_si256((const __m256i*)(codes + i * 2 * CHANNELS));
            to[i] = F == INT8 ? int8_lane(raw) : fp8_lane(raw);
        }
    }
}

template <Form F>
void linear_widened(const bf16* x, const uint8_t* codes, const float* scale, const float* zero, const bf16* bias,
                    bf16* y, int64_t rows, int64_t n, int64_t k, int64_t group, int threads) {
    const int64_t steps = k / 2, blocks = (n + CHANNELS - 1) / CHANNELS, spans = (blocks + WIDE - 1) / WIDE;
    const int64_t groups = F == INT4 ? (k + group - 1) / group : 1, block_bytes = steps * CHANNELS * (F == INT4 ? 1 : 2);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n * k > 1 << 18)
    for (int64_t span = 0; span < spans; ++span) {
        static thread_local std::vector<uint8_t> room;
        room.resize(WIDE * steps * 64 + 64);
        uint8_t* const panel = room.data() + (64 - uintptr_t(room.data()) % 64) % 64;
        const int64_t b = span * WIDE;
        const int wide = int(std::min<int64_t>(WIDE, blocks - b));
        for (int c = 0; c < wide; ++c)
            widen<F>(codes + (b + c) * block_bytes, scale + (b + c) * groups * CHANNELS,
                     F == INT4 ? zero + (b + c) * groups * CHANNELS : nullptr, steps, group / 2,
                     (__m512i*)(panel + c * steps * 64));
        in_tiles(0, rows, [&](int64_t first, int count) {
            __m512 sums[TALL][WIDE];
            tile_of<__m512>(count, x + first * k, k, panel, steps * 64, wide, steps, sums);
            for (int r = 0; r < count; ++r)
                for (int c = 0; c < wide; ++c) {
                    const int64_t channel = (b + c) * CHANNELS;
                    __m512 value = sums[r][c];
                    if (F != INT4) value = _mm512_mul_ps(value, _mm512_loadu_ps(scale + channel));
                    finish(value, bias ? bias + channel : nullptr, y + (first + r) * n + channel, n - channel);
                }
        });
    }
}

}  // namespace

EXPORTED int quantized_linears() { return 1; }
#define W8A8(T, suffix)                                                                                               \
    EXPORTED void linear_w8a8_##suffix(const T* x, const uint8_t* weights, const float* scale, const int32_t* offset,  \
                                       const T* bias, T* y, int64_t rows, int64_t n, int64_t k, int threads) {         \
        linear_w8a8(x, weights, scale, offset, bias, y, rows, n, k, threads);                                          \
    }
W8A8(float, f32)
W8A8(bf16, bf16)
EXPORTED void linear_widened_bf16(int form, const bf16* x, const uint8_t* codes, const float* scale, const float* zero,
                                  const bf16* bias, bf16* y, int64_t rows, int64_t n, int64_t k, int64_t group,
                                  int threads) {
    auto* work = form == INT8 ? linear_widened<INT8> : form == INT4 ? linear_widened<INT4> : linear_widened<FP8>;
    work(x, codes, scale, zero, bias, y, rows, n, k, group, threads);
}
#else
EXPORTED int quantized_linears() { return 0; }
EXPORTED void linear_w8a8_f32() {}
EXPORTED void linear_w8a8_bf16() {}
EXPORTED void linear_widened_bf16() {}
#endif
