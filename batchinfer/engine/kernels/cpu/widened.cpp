// Products with weights that alone are quantised: they are read as they are kept, and become what the activations are, a
// tile at a time, for as many rows as there are.
#include <vector>

#include "product.h"

#if defined(DOT_PRODUCTS)
namespace {

using namespace product;

enum Form { INT8 = 0, INT4 = 1, FP8 = 2 };

// Two numbers of each of 16 channels, as step `i` of a tile has them.
INLINE void put(bf16* to, int64_t i, __m512 low, __m512 high) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    store(to + i * 2 * CHANNELS, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both));
}
INLINE void put(float* to, int64_t i, __m512 low, __m512 high) {
    store(to + i * 2 * CHANNELS, low);
    store(to + (i * 2 + 1) * CHANNELS, high);
}

INLINE __m512 int8(__m512i byte, int above) {  // the one with so many bits above it
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(byte, above), 24));
}

INLINE __m512 e4m3(__m512i low_byte) {  // exponent and mantissa moved into a float's, then the difference of biases
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(low_byte, _mm512_set1_epi32(0x80)), 24);
    const __m512i rest = _mm512_slli_epi32(_mm512_and_si512(low_byte, _mm512_set1_epi32(0x7f)), 20);
    const __m512 value = _mm512_mul_ps((__m512)rest, _mm512_set1_ps(0x1p120f));
    return (__m512)_mm512_or_si512(sign, (__m512i)value);
}

INLINE __m512 int4(__m512i number, __m512 scale, __m512 zero) {
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(number), zero), scale);
}

// One block of 16 channels, all of K.
template <Form F, class T>
void widen(const uint8_t* codes, const float* scale, const float* zero, int64_t pairs, int64_t group, T* to) {
    if constexpr (F == INT4) {
        for (int64_t k = 0, g = 0; k < pairs; k += group, ++g) {
            const __m512 s = _mm512_loadu_ps(scale + g * CHANNELS), z = _mm512_loadu_ps(zero + g * CHANNELS);
            const int64_t end = std::min(pairs, k + group);
            for (int64_t i = k; i < end; ++i) {
                const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i * CHANNELS)));
                put(to, i, int4(_mm512_and_si512(byte, _mm512_set1_epi32(15)), s, z),
                    int4(_mm512_srli_epi32(byte, 4), s, z));
            }
        }
    } else {
        for (int64_t i = 0; i < pairs; ++i) {
            const __m256i raw = _mm256_loadu_si256((const __m256i*)(codes + i * 2 * CHANNELS));
            const __m512i pair = _mm512_cvtepu16_epi32(raw);
            if constexpr (F == INT8)
                put(to, i, int8(pair, 24), int8(pair, 16));
            else
                put(to, i, e4m3(pair), e4m3(_mm512_srli_epi32(pair, 8)));
        }
    }
}

template <Form F, class T>
void linear_widened(const T* x, const uint8_t* codes, const float* scale, const float* zero, const T* bias, T* y,
                    int64_t rows, int64_t n, int64_t k, int64_t group, int threads) {
    const int64_t blocks = (n + CHANNELS - 1) / CHANNELS, spans = (blocks + WIDE - 1) / WIDE;
    const int64_t groups = F == INT4 ? (k + group - 1) / group : 1, block_bytes = k / 2 * CHANNELS * (F == INT4 ? 1 : 2);
    const int64_t steps = k * sizeof(T) / 4, wide_bytes = steps * 64;
    const Output<T> to{bias, y, n, n};
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n * k > WORTH_A_THREAD)
    for (int64_t span = 0; span < spans; ++span) {
        static thread_local std::vector<uint8_t> room;
        room.resize(WIDE * wide_bytes + 64);
        uint8_t* const panel = room.data() + (64 - uintptr_t(room.data()) % 64) % 64;
        const int64_t b = span * WIDE;
        const int wide = int(std::min<int64_t>(WIDE, blocks - b));
        for (int c = 0; c < wide; ++c)
            widen<F>(codes + (b + c) * block_bytes, scale + (b + c) * groups * CHANNELS,
                     F == INT4 ? zero + (b + c) * groups * CHANNELS : nullptr, k / 2, group / 2,
                     reinterpret_cast<T*>(panel + c * wide_bytes));
        const uint8_t* const second = panel + (wide - 1) * wide_bytes;
        const auto put = [&](int64_t row, int64_t block, __m512 sum) __attribute__((always_inline)) {
            if (block >= blocks) return;
            to.put(row, block, to.biased(block, F == INT4 ? (vf)sum : (vf)sum * load<vf>(scale + block * CHANNELS)));
        };
        pair<__m512>(x, k, 0, rows, panel, second, nullptr, nullptr, steps,
                     [&](int64_t row, __m512 one, __m512 other) __attribute__((always_inline)) {
                         put(row, b, one);
                         put(row, b + 1, other);
                     });
    }
}

}  // namespace

#define WIDENED(T, suffix)                                                                                            \
    EXPORTED void linear_widened_##suffix(int form, const T* x, const uint8_t* codes, const float* scale,              \
                                          const float* zero, const T* bias, T* y, int64_t rows, int64_t n, int64_t k,  \
                                          int64_t group, int threads) {                                                \
        auto* work = form == INT8 ? linear_widened<INT8, T> : form == INT4 ? linear_widened<INT4, T>                   \
                                                                           : linear_widened<FP8, T>;                   \
        work(x, codes, scale, zero, bias, y, rows, n, k, group, threads);                                              \
    }
WIDENED(float, f32)
WIDENED(bf16, bf16)
#else
EXPORTED void linear_widened_f32() {}
EXPORTED void linear_widened_bf16() {}
#endif
