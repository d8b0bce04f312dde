// Layers of a decoder in one call: between calls every thread but one waits, and all of them begin anew.
// What each operator computes is the same bits as by itself.
#include "attention.h"
#include "linear.h"
#include "norm.h"
#include "rope.h"

#if defined(DOT_PRODUCTS)
namespace {

using namespace attending;

struct Layer {  // as in the Python class of that name, as are those below
    const float *attn_norm, *q_norm, *k_norm, *mlp_norm;
    Matrix qkv, o, gate_up, down;
    void* cache;
};

struct Step {
    const float* cos_sin;
    float* residual;  // [tokens, hidden]
    bf16 *normed, *qkv, *q, *attended, *activated, *delta;
    float eps;
};

// A thread's part of y = x @ m.T, by way of `rounded` where that is in 8 bits.
void multiply(const Matrix& m, const bf16* x, bf16* y, int64_t rows, bool gated, Rounded& rounded, Team team) {
    if (!m.scale) return multiply_bf16(m, x, y, rows, gated, team);
    rounded.take(x, m.k, team.share(rows));
    team.wait();
    multiply_w8a8(m, rounded, y, rows, gated, team);
}

template <class Kept>
void run(const Layer* layers, int64_t count, const Shape& shape, const Batch& batch, const Step& step, int threads) {
    static thread_local Memory partials;
    static thread_local Rounded own;
    Rounded& rounded = own;  // the caller's, for all threads
    const int64_t tokens = batch.tokens, hidden = layers->qkv.k;
    rounded.make_room(tokens, std::max({layers->qkv.k, layers->o.k, layers->down.k}));
    Attention<bf16, Kept> attention{shape, batch, step.q, nullptr, step.attended};
    const Dealt dealt = attention.deal(threads);
    float* const partial = partials.at_least(dealt.partial);
    std::atomic<size_t> taken;
#pragma omp parallel num_threads(threads) firstprivate(attention)
    {
        const Team team = Team::here();
        const Range own_tokens = team.share(tokens);
        const auto add_and_norm = [&](const bf16* delta, const float* weight) {
            for (int64_t t = own_tokens.begin; t < own_tokens.end; ++t)
                add_rms_norm_row(step.residual + t * hidden, delta ? delta + t * hidden : nullptr, weight, step.eps,
                                 step.normed + t * hidden, hidden);
            team.wait();
        };
        for (const Layer* layer = layers; layer < layers + count; ++layer) {
            add_and_norm(layer == layers ? nullptr : step.delta, layer->attn_norm);
            multiply(layer->qkv, step.normed, step.qkv, tokens, false, rounded, team);
            team.wait();
            attention.cache = static_cast<Kept*>(layer->cache);
            rope_write(shape, step.qkv, step.cos_sin, batch, static_cast<Kept*>(layer->cache), layer->q_norm,
                       layer->k_norm, step.eps, step.q, own_tokens);
            if (team.thread == 0) taken = 0;
            team.wait();
            attention.work_off(dealt, partial, taken);
            team.wait();
            multiply(layer->o, step.attended, step.delta, tokens, false, rounded, team);
            team.wait();
            add_and_norm(step.delta, layer->mlp_norm);
            multiply(layer->gate_up, step.normed, step.activated, tokens, true, rounded, team);
            team.wait();
            multiply(layer->down, step.activated, step.delta, tokens, false, rounded, team);
            team.wait();
        }
    }
}

}  // namespace

EXPORTED void layers_bf16(const Layer* layers, int64_t count, const Shape* shape, const Batch* batch, const Step* step,
                          int threads) {
    run<bf16>(layers, count, *shape, *batch, *step, threads);
}
EXPORTED void layers_bf16_int8(const Layer* layers, int64_t count, const Shape* shape, const Batch* batch,
                               const Step* step, int threads) {
    run<int8_t>(layers, count, *shape, *batch, *step, threads);
}
#else
EXPORTED void layers_bf16() {}
EXPORTED void layers_bf16_int8() {}
#endif
