// Products of activations and weights of one width: bfloat16, and W8A8 with activations rounded before.
// Where the channels are SwiGLU's gate and up, the product gives silu(gate) * up at once.
#pragma once
#include <vector>

#include "product.h"

struct Matrix {  // as in the Python class of that name
    const uint8_t* weights;
    const float* scale;     // of a channel, W8A8; none: bfloat16
    const int32_t* offset;  // of a channel, what unsigned activations add to its sums
    const void* bias;       // of the activations' type, or none
    int64_t n, k;
};

#if defined(DOT_PRODUCTS)
namespace {

using namespace product;

inline int64_t blocks_of(const Matrix& m) { return (m.n + CHANNELS - 1) / CHANNELS; }

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

// bfloat16 times bfloat16, by a team.
INLINE void multiply_bf16(const Matrix& m, const bf16* x, bf16* y, int64_t rows, bool gated, bool by_rows,
                          Team& team) {
    const int64_t blocks = blocks_of(m), apart = gated ? blocks / 2 : 1;
    const Output<bf16> to{static_cast<const bf16*>(m.bias), y, m.n, gated ? m.n / 2 : m.n};
    multiply<__m512>(x, m.k, rows, m.weights, blocks, apart, m.k / 2, by_rows, team,
                     [&](int64_t row, int64_t block, __m512 one, __m512 two) __attribute__((always_inline)) {
                         put(to, gated, row, block, block + apart, (vf)one, (vf)two);
                     });
}

// x / scale + 128, so that 0 becomes 128; returns the scale. Where something is not finite, the scale is NaN.
template <class T>
float quantize_row(const T* x, int64_t n, uint8_t* to, int64_t padded) {
    // Of bit patterns without their sign, the largest tells: what is not finite is above all that is.
    vi most = {};
    int32_t top = 0;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        const vi v = bits<vi>(load_float(x + i)) & 0x7fffffff;
        most = v > most ? v : most;
    }
    for (int lane = 0; lane < VL; ++lane) top = std::max(top, most[lane]);
    for (; i < n; ++i) top = std::max(top, bits<int32_t>(to_float(x[i])) & 0x7fffffff);
    const float largest = bits<float>(top);
    const bool finite = top < 0x7f800000;
    const float scale = finite ? largest / 127.0f : __builtin_nanf("");
    const float inverse = finite && top > 0 ? 127.0f / largest : 0.0f;
    for (i = 0; i + VL <= n; i += VL) {
        const __m512i q = _mm512_cvtps_epi32((__m512)(load_float(x + i) * inverse));
        _mm_storeu_si128((__m128i*)(to + i),
                         _mm_xor_si128(_mm512_cvtsepi32_epi8(q), _mm_set1_epi8(char(0x80))));
    }
    for (; i < n; ++i) to[i] = uint8_t(128 + int(__builtin_rintf(to_float(x[i]) * inverse)));
    for (; i < padded; ++i) to[i] = 128;
    return scale;
}

struct Rounded {  // activations in 8 bits
    std::vector<uint8_t> codes;  // [rows, k rounded up to 4]
    std::vector<float> scales;   // of each row

    static int64_t padded(int64_t k) { return (k + 3) / 4 * 4; }

    void make_room(int64_t rows, int64_t k) {
        codes.resize(std::max<size_t>(codes.size(), rows * padded(k)));
        scales.resize(std::max<size_t>(scales.size(), rows));
    }

    template <class T>
    void take(const T* x, int64_t k, Range rows) {
        for (int64_t r = rows.begin; r < rows.end; ++r) take_row(x + r * k, k, r);
    }

    template <class T>
    void take_row(const T* x, int64_t k, int64_t row) {
        scales[row] = quantize_row(x, k, codes.data() + row * padded(k), padded(k));
    }
};

// W8A8, by a team.
template <class T>
INLINE void multiply_w8a8(const Matrix& m, const Rounded& x, T* y, int64_t rows, bool gated, bool by_rows,
                          Team& team) {
    const int64_t blocks = blocks_of(m), apart = gated ? blocks / 2 : 1, padded = Rounded::padded(m.k);
    const float* const row_scale = x.scales.data();
    const Output<T> to{static_cast<const T*>(m.bias), y, m.n, gated ? m.n / 2 : m.n};
    const auto value = [&](int64_t row, int64_t block, __m512i sum) __attribute__((always_inline)) {
        const int64_t channel = std::min(block, blocks - 1) * CHANNELS;
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_loadu_si512(m.offset + channel));
        return (vf)_mm512_cvtepi32_ps(exact) * load<vf>(m.scale + channel) * row_scale[row];
    };
    multiply<__m512i>(x.codes.data(), padded, rows, m.weights, blocks, apart, padded / 4, by_rows, team,
                      [&](int64_t row, int64_t block, __m512i one, __m512i two) __attribute__((always_inline)) {
                          put(to, gated, row, block, block + apart, value(row, block, one),
                              value(row, block + apart, two));
                      });
}

}  // namespace
#endif
