// Element-wise work between the matrix products: residual + RMSNorm, SiLU * up.
#include "norm.h"

namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // elements; below, waking the other threads costs more than they save

template <class T>
void add_rms_norm(float* residual, const T* delta, const float* weight, float eps, T* out, int64_t tokens,
                  int64_t hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * hidden > WORTH_A_THREAD)
    for (int64_t t = 0; t < tokens; ++t)
        add_rms_norm_row(residual + t * hidden, delta ? delta + t * hidden : nullptr, weight, eps, out + t * hidden,
                         hidden);
}

template <class T>
void silu_mul_row(const T* gate, const T* up, T* out, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf g = load_float(gate + i);
        store_float(out + i, silu(g, T{}) * load_float(up + i));
    }
    for (; i < n; ++i) {
        from_float(out + i, silu(all(to_float(gate[i])), T{})[0] * to_float(up[i]));
    }
}

template <class T>
void silu_mul(const T* gate_up, T* out, int64_t tokens, int64_t intermediate, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * intermediate > WORTH_A_THREAD)
    for (int64_t t = 0; t < tokens; ++t) {
        const T* gate = gate_up + t * 2 * intermediate;
        silu_mul_row(gate, gate + intermediate, out + t * intermediate, intermediate);
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                             \
    EXPORTED void add_rms_norm_##suffix(float* residual, const T* delta, const float* weight, float eps, T* out,   \
                                          int64_t tokens, int64_t hidden, int threads) {                             \
        add_rms_norm(residual, delta, weight, eps, out, tokens, hidden, threads);                                    \
    }                                                                                                                \
    EXPORTED void silu_mul_##suffix(const T* gate_up, T* out, int64_t tokens, int64_t intermediate, int threads) { \
        silu_mul(gate_up, out, tokens, intermediate, threads);                                                       \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
