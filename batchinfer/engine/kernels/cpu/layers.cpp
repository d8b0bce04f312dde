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
    Work work(threads);
#pragma omp parallel num_threads(threads) firstprivate(attention)
    {
        Team team = Team::here(work);
        const bool by_rows = tokens >= ROWS_A_THREAD * team.threads;
        // The next product's activations are rounded where the rows are at hand, else in a pass of their own.
        const auto add_and_norm = [&](const bf16* delta, const float* weight, const Matrix& next) {
            team.deal(tokens, ROWS_AT_ONCE, [&](Range range) {
                for (int64_t t = range.begin; t < range.end; ++t) {
                    bf16* const normed = step.normed + t * hidden;
                    add_rms_norm_row(step.residual + t * hidden, delta ? delta + t * hidden : nullptr, weight, step.eps,
                                     normed, hidden);
                    if (next.scale) rounded.take_row(normed, hidden, t);
                }
            });
            team.wait();
        };
        const auto round = [&](const Matrix& next, const bf16* x) {
            if (!next.scale) return;
            team.deal(tokens, ROWS_AT_ONCE, [&](Range range) { rounded.take(x, next.k, range); });
            team.wait();
        };
        const auto multiply = [&](const Matrix& m, const bf16* x, bf16* y, bool gated) {
            if (m.scale)
                multiply_w8a8(m, rounded, y, tokens, gated, by_rows, team);
            else
                multiply_bf16(m, x, y, tokens, gated, by_rows, team);
            team.wait();
        };
        for (const Layer* layer = layers; layer < layers + count; ++layer) {
            add_and_norm(layer == layers ? nullptr : step.delta, layer->attn_norm, layer->qkv);
            multiply(layer->qkv, step.normed, step.qkv, false);
            attention.cache = static_cast<Kept*>(layer->cache);
            team.deal(tokens, ROWS_AT_ONCE, [&](Range range) {
                rope_write(shape, step.qkv, step.cos_sin, batch, static_cast<Kept*>(layer->cache), layer->q_norm,
                           layer->k_norm, step.eps, step.q, range);
            });
            team.wait();
            attention.work_off(dealt, partial, team);
            team.wait();
            round(layer->o, step.attended);
            multiply(layer->o, step.attended, step.delta, false);
            add_and_norm(step.delta, layer->mlp_norm, layer->gate_up);
            multiply(layer->gate_up, step.normed, step.activated, true);
            round(layer->down, step.activated);
            multiply(layer->down, step.activated, step.delta, false);
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
