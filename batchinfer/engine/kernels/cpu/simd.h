// Vectors of VL floats in the widest registers the compiler was told of, with GCC's and clang's vector extensions.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define EXPORTED extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int VL = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VL = 4;
constexpr int REGISTERS = 32;
#else
constexpr int VL = 4;
constexpr int REGISTERS = 16;
#endif

#if defined(__AVX512BF16__)
constexpr bool NATIVE_BF16 = true;
#else
constexpr bool NATIVE_BF16 = false;
#endif

struct bf16 {
    uint16_t bits;
};

template <class E, int N>
struct VectorOf {
    typedef E type __attribute__((vector_size(N * sizeof(E))));
};
using vf = VectorOf<float, VL>::type;
using vi = VectorOf<int32_t, VL>::type;
using vu = VectorOf<uint32_t, VL>::type;
using vh = VectorOf<uint16_t, VL>::type;

template <class V, class E>
INLINE V load(const E* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class E>
INLINE void store(E* to, V v) {
    __builtin_memcpy(to, &v, sizeof v);
}

template <class To, class From>
INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

INLINE vf all(float x) { return vf{} + x; }
INLINE vi all(int32_t x) { return vi{} + x; }

INLINE vi lane_index() {
    vi v;
    for (int i = 0; i < VL; ++i) v[i] = i;
    return v;
}

// Comparisons with NaN are false, so both keep the second argument where the first is NaN.
INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// a * b + c, rounded once where the machine can. The compiler is told to fuse nothing by itself (library.py).
INLINE vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// ---- one element and a vector of them, as float

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }

INLINE void from_float(float* to, float x) { *to = x; }
INLINE void from_float(bf16* to, float x) {  // round to nearest, ties to even; a NaN stays one
    uint32_t u = bits<uint32_t>(x);
    to->bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

INLINE vf load_float(const float* from) { return load<vf>(from); }
INLINE vf load_float(const bf16* from) {
    return bits<vf>(__builtin_convertvector(load<vh>(from), vu) << 16);
}

INLINE void store_float(float* to, vf x) { store(to, x); }
INLINE void store_float(bf16* to, vf x) {
#if defined(__AVX512BF16__)
    store(to, _mm512_cvtneps_pbh((__m512)x));
#else
    vu u = bits<vu>(x);
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    store(to, __builtin_convertvector(x != x ? vu{} + 0x7fc0u : rounded, vh));
#endif
}

// ---- reductions

template <int N>
INLINE float sum_of(typename VectorOf<float, N>::type v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        using Half = typename VectorOf<float, N / 2>::type;
        Half halves[2];
        __builtin_memcpy(halves, &v, sizeof v);
        return sum_of<N / 2>(halves[0] + halves[1]);
    }
}
INLINE float sum(vf v) { return sum_of<VL>(v); }

template <int N>
INLINE float largest_of(typename VectorOf<float, N>::type v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        using Half = typename VectorOf<float, N / 2>::type;
        Half halves[2];
        __builtin_memcpy(halves, &v, sizeof v);
        return largest_of<N / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
    }
}
INLINE float largest(vf v) { return largest_of<VL>(v); }

// ---- exp: relative error below 1.2e-7 (Cephes' expf polynomial); 0 below -87.3, so -inf gives 0

INLINE vf exp(vf x) {
    const vf low = all(-87.3365f), round = all(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
    vf clamped = min(max(x, low), all(88.3762f));
    vf shifted = fused(clamped, all(1.44269504088896341f), round);
    vf n = shifted - round;
    vf r = fused(n, all(-0.693359375f), clamped);
    r = fused(n, all(2.12194440e-4f), r);
    vf p = all(1.9875691500e-4f);
    p = fused(p, r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    p = fused(p, r * r, r) + 1.0f;
    vi power = (bits<vi>(shifted) - bits<vi>(round) + 127) << 23;
    vf y = p * bits<vf>(power);
    return x < low ? vf{} : y;
}

INLINE float exp(float x) { return exp(all(x))[0]; }

// ---- 2^x: relative error below 1.2e-7 at DEGREE 6 and 8e-5 at DEGREE 3 (bf16 keeps 4e-3); 0 below -126, so -inf gives 0

template <int DEGREE>
INLINE vf exp2(vf x) {
    static_assert(DEGREE == 6 || DEGREE == 3);
#if defined(__AVX512F__)
    const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf r = x - n;
#else
    const vf round = all(12582912.f);
    const vf shifted = max(x, all(-126.f)) + round;
    const vf r = max(x, all(-126.f)) - (shifted - round);
#endif
    vf p;
    if constexpr (DEGREE == 6) {
        p = all(1.5345812e-4f);
        p = fused(p, r, all(1.3399931e-3f));
        p = fused(p, r, all(9.618489e-3f));
        p = fused(p, r, all(5.5503286e-2f));
        p = fused(p, r, all(2.4022646e-1f));
        p = fused(p, r, all(6.931472e-1f));
        p = fused(p, r, all(1.0f));
    } else {
        p = all(5.517167e-2f);
        p = fused(p, r, all(2.4261113e-1f));
        p = fused(p, r, all(6.9326097e-1f));
        p = fused(p, r, all(9.9992806e-1f));
    }
#if defined(__AVX512F__)
    // Masked, since a result that is not a normal float costs a microcode assist of a hundred cycles.
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_GE_OQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    const vf y = bits<vf>(bits<vi>(p) + ((bits<vi>(shifted) - bits<vi>(round)) << 23));
    return x < all(-126.f) ? vf{} : y;
#endif
}

// ---- SiLU, g / (1 + e^-g), as exactly as T can tell

INLINE vf silu(vf g, float) { return g / (1.0f + exp(-g)); }
INLINE vf silu(vf g, bf16) {
    const vf below = 1.0f + exp2<3>(min(g * -1.44269504f, all(126.f)));
#if defined(__AVX512F__)
    return g * (vf)_mm512_rcp14_ps((__m512)below);
#else
    return g / below;
#endif
}
