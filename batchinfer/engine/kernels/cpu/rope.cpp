// Head norm, rotary embedding and the write into the cache, of the tokens of a step.
#include "rope.h"

namespace {

template <class T, class Kept>
void rope_write_all(const Shape& shape, const T* qkv, const float* cos_sin, const Batch& batch, Kept* cache,
                    const float* q_norm, const float* k_norm, float eps, T* q_out, int threads) {
    const int64_t row = int64_t(shape.heads + 2 * shape.kv_heads) * shape.dim;
    Work work(threads);
#pragma omp parallel num_threads(threads) if (batch.tokens * row > 1 << 15)
    {
        Team team = Team::here(work);
        team.deal(batch.tokens, ROWS_AT_ONCE, [&](Range tokens) {
            rope_write(shape, qkv, cos_sin, batch, cache, q_norm, k_norm, eps, q_out, tokens);
        });
    }
}

}  // namespace

#define EXPORT(T, Kept, suffix)                                                                                        \
    EXPORTED void rope_write_##suffix(const Shape* shape, const Batch* batch, const T* qkv, const float* cos_sin,    \
                                        Kept* cache, const float* q_norm, const float* k_norm, float eps, T* q_out,    \
                                        int threads) {                                                                 \
        rope_write_all(*shape, qkv, cos_sin, *batch, cache, q_norm, k_norm, eps, q_out, threads);                      \
    }                                                                                                                  \
    EXPORTED int64_t page_bytes_##suffix(const Shape* shape) {                                                         \
        return shape->kv_heads * shape->head_elements<T>() * int64_t(sizeof(Kept));                                    \
    }
EXPORT(float, float, f32)
EXPORT(bf16, bf16, bf16)
EXPORT(float, int8_t, f32_int8)
EXPORT(bf16, int8_t, bf16_int8)
