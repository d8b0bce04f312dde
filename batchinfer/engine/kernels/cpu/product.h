// Matrix products, y = x @ weight.T, by the dot-product instructions: AVX512-VNNI on bytes, AVX512-BF16 on bfloat16.
// Weights lie in blocks of 16 output channels, a lane of 4 bytes of each channel after another: [N / 16, steps, 16, 4].
#pragma once
#include <algorithm>

#include "simd.h"
#include "team.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define DOT_PRODUCTS 1

namespace product {

constexpr int WIDE = 2;   // blocks of 16 channels that a tile spans
constexpr int TALL = 12;  // rows of a tile: 24 sums, 2 weights and an activation fit the 32 registers
constexpr int CHANNELS = 16;
constexpr int EACH = 8;  // things to deal for each thread: the last of them is what the others may wait for
constexpr int64_t ROWS_A_THREAD = 32;  // from here on a thread's own rows make up for reading all weights
constexpr int64_t WORTH_A_THREAD = 1 << 18;  // multiplications; below, waking the other threads costs more

INLINE __m512i dot(__m512i sum, __m512i weights, const uint8_t* x) {  // 4 unsigned bytes with 4 signed ones, a lane
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(load<int32_t>(x)), weights);
}
INLINE __m512 dot(__m512 sum, __m512i weights, const bf16* x) {  // 2 numbers a lane
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(load<int32_t>(x)));
}
INLINE __m512 dot(__m512 sum, __m512i weights, const float* x) {  // 1 number a lane
    return _mm512_fmadd_ps((__m512)weights, _mm512_set1_ps(*x), sum);
}

// Of the two blocks that come next from memory, what is fetched into the second-level cache while a tile is computed.
struct Ahead {
    const uint8_t *first, *second;
    int64_t lines;  // of each, at most one a step
};

// One tile: R rows of x, `stride` numbers apart, against the blocks at `first` and `second`.
template <int R, class Sum, class X>
__attribute__((noinline)) void tile(const X* x, int64_t stride, const uint8_t* first, const uint8_t* second,
                                    int64_t steps, Ahead ahead, Sum (*sums)[WIDE]) {
    Sum acc[R][WIDE] = {};
    // Four rows to a pointer: with one for each there are more than registers, and each step waits for some of them.
    const X* of_four[(R + 3) / 4];
    for (int r = 0; r < R; r += 4) of_four[r / 4] = x + r * stride;
    const int64_t third = 3 * stride;
    const auto step = [&]() __attribute__((always_inline)) {
        const __m512i w[WIDE] = {_mm512_loadu_si512(first), _mm512_loadu_si512(second)};
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < WIDE; ++c)
                acc[r][c] = dot(acc[r][c], w[c], of_four[r / 4] + (r % 4 == 3 ? third : r % 4 * stride));
        first += 64, second += 64;
#pragma GCC unroll 3
        for (auto& at : of_four) {
            at += 4 / sizeof(X);
            asm("" : "+r"(at));  // or the compiler makes a pointer of every row again
        }
    };
    int64_t k = 0;
    for (; k < ahead.lines; ++k) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead.first + k * 64), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(ahead.second + k * 64), _MM_HINT_T1);
        step();
    }
    for (; k < steps; ++k) step();
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < WIDE; ++c) sums[r][c] = acc[r][c];
}

template <class Sum, int R = TALL, class X>
void tile_of(int rows, const X* x, int64_t stride, const uint8_t* first, const uint8_t* second, int64_t steps,
             Ahead ahead, Sum (*sums)[WIDE]) {
    if (rows == R)
        tile<R>(x, stride, first, second, steps, ahead, sums);
    else if constexpr (R > 1)
        tile_of<Sum, R - 1>(rows, x, stride, first, second, steps, ahead, sums);
}

// Rows against one pair of blocks, in tiles as even as can be; meanwhile the `next` pair is fetched, if there is one.
// finish(row, sum of the first block, sum of the second).
template <class Sum, class X, class Finish>
INLINE void pair(const X* x, int64_t stride, int64_t begin, int64_t end, const uint8_t* first, const uint8_t* second,
                 const uint8_t* next_first, const uint8_t* next_second, int64_t steps, Finish finish) {
    const int64_t count = end - begin, tiles = (count + TALL - 1) / TALL;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t top = begin + count * t / tiles, bottom = begin + count * (t + 1) / tiles;
        const int64_t from = steps * t / tiles, to = steps * (t + 1) / tiles;
        const Ahead ahead = {next_first + from * 64, next_second + from * 64, next_first ? to - from : 0};
        Sum sums[TALL][WIDE];
        tile_of(int(bottom - top), x + top * stride, stride, first, second, steps, ahead, sums);
        for (int64_t row = top; row < bottom; ++row) finish(row, sums[row - top][0], sums[row - top][1]);
    }
}

// Where sums go: y [rows, width], bias [n] or none.
template <class T>
struct Output {
    const T* bias;
    T* y;
    int64_t n, width;

    INLINE vf biased(int64_t block, vf value) const {
        if (!bias) return value;
        const int64_t channel = block * CHANNELS;
        if (channel + CHANNELS <= n) return value + load_float(bias + channel);
        for (int64_t i = 0; channel + i < n; ++i) value[i] += to_float(bias[channel + i]);
        return value;
    }

    // A block's numbers of one row; those of channels beyond the last are dropped.
    INLINE void put(int64_t row, int64_t block, vf value) const {
        const int64_t channel = block * CHANNELS;
        T* const to = y + row * width + channel;
        if (channel + CHANNELS <= width) return store_float(to, value);
        for (int64_t i = 0; channel + i < width; ++i) from_float(to + i, value[i]);
    }
};

// All rows against all blocks, by a team. Spans of two blocks are dealt, and parts of the rows where spans are too few to
// go round evenly; or `by_rows` each thread has rows of its own, the same that it has of what is dealt row by row, since
// what another core has just written may be as far away as memory. `apart` is how many blocks lie between the two of a
// span: 1, or half of them where the first half of the channels belongs with the other. finish(row, block, sums of it,
// sums of the block `apart` from it); where their number is odd, the last block comes twice.
template <class Sum, class X, class Finish>
INLINE void multiply(const X* x, int64_t stride, int64_t rows, const uint8_t* weights, int64_t blocks, int64_t apart,
                     int64_t steps, bool by_rows, Team& team, Finish finish) {
    const int64_t spans = apart == 1 ? (blocks + 1) / 2 : apart, most = (rows + TALL - 1) / TALL;
    int64_t parts = by_rows ? team.threads : 1;
    if (!by_rows)
        while (parts < most && spans * parts < EACH * team.threads) ++parts;
    const auto span_of = [&](int64_t item) { return by_rows ? item % spans : item / parts; };
    const auto block = [&](int64_t span, int second) {
        const int64_t at = apart == 1 ? span * 2 + second : span + second * apart;
        return weights + std::min(at, blocks - 1) * steps * 64;
    };
    team.deal(spans * parts, [&](int64_t item, int64_t then) __attribute__((always_inline)) {
        const int64_t span = span_of(item), part = by_rows ? item / spans : item % parts, next = span_of(then);
        const bool fetch = then >= 0 && next != span;
        const int64_t at = apart == 1 ? span * 2 : span;
        pair<Sum>(x, stride, rows * part / parts, rows * (part + 1) / parts, block(span, 0), block(span, 1),
                  fetch ? block(next, 0) : nullptr, fetch ? block(next, 1) : nullptr, steps,
                  [&](int64_t row, Sum a, Sum b) __attribute__((always_inline)) { finish(row, at, a, b); });
    });
}

}  // namespace product
#endif
