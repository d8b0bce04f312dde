// Products with weights as wide as the activations.
#include "linear.h"

#if defined(DOT_PRODUCTS)
namespace {

bool worth_threads(const Matrix& m, int64_t rows) { return rows * m.n * m.k > WORTH_A_THREAD; }

template <class T>
void linear_w8a8(const Matrix& m, const T* x, T* y, int64_t rows, bool gated, int threads) {
    static thread_local Rounded own;
    Rounded& rounded = own;  // the caller's, for all threads
    rounded.make_room(rows, m.k);
    Work work(threads);
#pragma omp parallel num_threads(threads) if (worth_threads(m, rows))
    {
        Team team = Team::here(work);
        team.deal(rows, ROWS_AT_ONCE, [&](Range range) { rounded.take(x, m.k, range); });
        team.wait();
        multiply_w8a8(m, rounded, y, rows, gated, false, team);
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
EXPORTED void linear_bf16(const Matrix* m, const bf16* x, bf16* y, int64_t rows, int gated, int threads) {
    Work work(threads);
#pragma omp parallel num_threads(threads) if (worth_threads(*m, rows))
    {
        Team team = Team::here(work);
        multiply_bf16(*m, x, y, rows, bool(gated), false, team);
    }
}
EXPORTED void linear_w8a8_f32(const Matrix* m, const float* x, float* y, int64_t rows, int gated, int threads) {
    linear_w8a8(*m, x, y, rows, bool(gated), threads);
}
EXPORTED void linear_w8a8_bf16(const Matrix* m, const bf16* x, bf16* y, int64_t rows, int gated, int threads) {
    linear_w8a8(*m, x, y, rows, bool(gated), threads);
}
#else
EXPORTED int dot_products() { return 0; }
EXPORTED int best_bf16() { return 0; }
EXPORTED void linear_bf16() {}
EXPORTED void linear_w8a8_f32() {}
EXPORTED void linear_w8a8_bf16() {}
#endif
