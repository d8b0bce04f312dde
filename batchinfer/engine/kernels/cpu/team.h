// The threads that work on an operator together.
#pragma once
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

struct Range {
    int64_t begin, end;
};

struct Team {
    int thread = 0, threads = 1;

    static Team here() {  // inside of a parallel region
#if defined(_OPENMP)
        return {omp_get_thread_num(), omp_get_num_threads()};
#else
        return {};
#endif
    }

    // This thread's part of n things.
    Range share(int64_t n) const { return {n * thread / threads, n * (thread + 1) / threads}; }

    // For all of them; what they wrote before can be read after.
    void wait() const {
#pragma omp barrier
    }
};
