// Attention of the tokens of a step.
#include "attention.h"

namespace attending {

ATTENDING(, bf16, bf16)
ATTENDING(, bf16, int8_t)

}  // namespace attending

namespace {

using namespace attending;

template <class T, class Kept>
void attend(const Attention<T, Kept>& attention, int threads) {
    static thread_local Memory shared;
    const Dealt dealt = attention.deal(threads);
    float* const partials = shared.at_least(dealt.partial);
    Work work(threads);
#pragma omp parallel num_threads(threads) if (dealt.units.size() > 1)
    {
        Team team = Team::here(work);
        attention.work_off(dealt, partials, team);
    }
}

}  // namespace

#define EXPORT(T, Kept, suffix)                                                                                \
    EXPORTED void attend_##suffix(const Shape* shape, const Batch* batch, const T* q, const Kept* cache,     \
                                    T* out, int threads) {                                                     \
        attend(Attention<T, Kept>{*shape, *batch, q, cache, out}, threads);                                    \
    }
EXPORT(float, float, f32)
EXPORT(bf16, bf16, bf16)
EXPORT(float, int8_t, f32_int8)
EXPORT(bf16, int8_t, bf16_int8)
