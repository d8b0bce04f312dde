// Products with weights that alone are quantised: they are read as they are kept, and become bfloat16 a tile at a time,
// for as many rows as there are.
#include <vector>

#include "product.h"

#if defined(DOT_PRODUCTS)
namespace {

using namespace product;

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
    const Output<bf16> to{bias, y, n, n};
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n * k > WORTH_A_THREAD)
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
        const uint8_t* const second = panel + (wide - 1) * steps * 64;
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

EXPORTED void linear_widened_bf16(int form, const bf16* x, const uint8_t* codes, const float* scale, const float* zero,
                                  const bf16* bias, bf16* y, int64_t rows, int64_t n, int64_t k, int64_t group,
                                  int threads) {
    auto* work = form == INT8 ? linear_widened<INT8> : form == INT4 ? linear_widened<INT4> : linear_widened<FP8>;
    work(x, codes, scale, zero, bias, y, rows, n, k, group, threads);
}
#else
EXPORTED void linear_widened_bf16() {}
#endif
