// What the operators ask of the machine underneath.
#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

// Pages are visited in any order: with 2 MiB of memory behind a translation, few of them miss the TLB.
EXPORTED void want_huge_pages(char* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t size = 1 << 21, begin = (uintptr_t(memory) + size - 1) / size * size;
    const uintptr_t end = (uintptr_t(memory) + bytes) / size * size;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    (void)memory, (void)bytes;
}

// How wide the library was built: floats a vector, and whether bf16 is multiplied natively.
EXPORTED int vector_floats() { return VL; }
EXPORTED int native_bf16() { return NATIVE_BF16; }

// The pool that a parallel region would use: 1 without OpenMP.
EXPORTED int openmp_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}
