// Residual + RMSNorm of one token.
#pragma once
#include "simd.h"

namespace {

template <class T>
void add_rms_norm_row(float* residual, const T* delta, const float* weight, float eps, T* out, int64_t hidden) {
    int64_t i = 0;
    vf squares[2] = {};
    float tail = 0;
    for (; i + 2 * VL <= hidden; i += 2 * VL)
        for (int k = 0; k < 2; ++k) {
            vf x = load<vf>(residual + i + k * VL);
            if (delta) store(residual + i + k * VL, x += load_float(delta + i + k * VL));
            squares[k] = fused(x, x, squares[k]);
        }
    for (; i < hidden; ++i) {
        float x = residual[i];
        if (delta) residual[i] = x += to_float(delta[i]);
        tail += x * x;
    }
    float scale = 1.0f / __builtin_sqrtf((sum(squares[0] + squares[1]) + tail) / float(hidden) + eps);
    for (i = 0; i + VL <= hidden; i += VL)
        store_float(out + i, load<vf>(residual + i) * scale * load<vf>(weight + i));
    for (; i < hidden; ++i) from_float(out + i, residual[i] * scale * weight[i]);
}

}  // namespace
