// Products of activations and weights of one width: bfloat16, and W8A8 with activations rounded in passing.
// Where the channels are SwiGLU's gate and up, the product gives silu(gate) * up at once.
#include <vector>

#include "product.h"

#if defined(DOT_PRODUCTS)
namespace {

using namespace product;

// Takes finished numbers: plain, or gate and up to their product.
template <class T>
INLINE void put(const Output<T>& to, bool gated, int64_t row, int64_t block, int64_t other, vf one, vf two) {
    if (gated) {
        to.put(row, block, silu(to.biased(block, one), T{}) * to.biased(other, two));
    } else {
        to.put(row, block, to.biased(block, one));
        to.put(row, other, to.biased(other, two));
    }
}

void linear_dense(const bf16* x, const uint8_t* weights, const bf16* bias, bf16* y, int64_t rows, int64_t n, int64_t k,
                  bool gated, int threads) {
    const int64_t blocks = (n + CHANNELS - 1) / CHANNELS, apart = gated ? blocks / 2 : 1;
    const Output<bf16> to{bias, y, n, gated ? n / 2 : n};
#pragma omp parallel num_threads(threads) if (rows * n * k > WORTH_A_THREAD)
    multiply<__m512>(x, k, rows, weights, blocks, apart, k / 2, team(), member(),
                     [&](int64_t row, int64_t block, __m512 one, __m512 two) __attribute__((always_inline)) {
                         put(to, gated, row, block, block + apart, (vf)one, (vf)two);
                     });
}

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
                 int64_t rows, int64_t n, int64_t k, bool gated, int threads) {
    static thread_local std::vector<uint8_t> codes;
    static thread_local std::vector<float> scales;
    const int64_t steps = (k + 3) / 4, padded = steps * 4, blocks = (n + CHANNELS - 1) / CHANNELS;
    const int64_t apart = gated ? blocks / 2 : 1;
    codes.resize(rows * padded);
    scales.resize(rows);
    uint8_t* const q = codes.data();
    float* const row_scale = scales.data();
    const Output<T> to{bias, y, n, gated ? n / 2 : n};
    const auto value = [&](int64_t row, int64_t block, __m512i sum) __attribute__((always_inline)) {
        const int64_t channel = std::min(block, blocks - 1) * CHANNELS;
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_loadu_si512(offset + channel));
        return (vf)_mm512_cvtepi32_ps(exact) * load<vf>(scale + channel) * row_scale[row];
    };
#pragma omp parallel num_threads(threads) if (rows * n * k > WORTH_A_THREAD)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) row_scale[r] = quantize_row(x + r * k, k, q + r * padded, padded);
        multiply<__m512i>(q, padded, rows, weights, blocks, apart, steps, team(), member(),
                          [&](int64_t row, int64_t block, __m512i one, __m512i two) __attribute__((always_inline)) {
                              put(to, gated, row, block, block + apart, value(row, block, one),
                                  value(row, block + apart, two));
                          });
    }
}

}  // namespace

EXPORTED int dot_products() { return 1; }
EXPORTED int best_bf16() {  // where there are tiles in hardware, whoever uses those is faster
#if defined(__AMX_BF16__)
    return 0;
#else
    return 1;
#endif
}
EXPORTED void linear_bf16(const bf16* x, const uint8_t* weights, const bf16* bias, bf16* y, int64_t rows, int64_t n,
                          int64_t k, int gated, int threads) {
    linear_dense(x, weights, bias, y, rows, n, k, bool(gated), threads);
}
#define W8A8(T, suffix)                                                                                               \
    EXPORTED void linear_w8a8_##suffix(const T* x, const uint8_t* weights, const float* scale, const int32_t* offset,  \
                                       const T* bias, T* y, int64_t rows, int64_t n, int64_t k, int gated,             \
                                       int threads) {                                                                  \
        linear_w8a8(x, weights, scale, offset, bias, y, rows, n, k, gated, threads);                                   \
    }
W8A8(float, f32)
W8A8(bf16, bf16)
#else
EXPORTED int dot_products() { return 0; }
EXPORTED int best_bf16() { return 0; }
EXPORTED void linear_bf16() {}
EXPORTED void linear_w8a8_f32() {}
EXPORTED void linear_w8a8_bf16() {}
#endif
