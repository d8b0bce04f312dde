// The two products of attention on Intel's matrix unit (AMX-BF16). The cache's layout is the one its tiles want: a page
// of 16 keys holds K as rows of 16 keys x 2 dimensions, V as rows of 16 dimensions x 2 keys.
#pragma once
#include "paged.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {

constexpr int ROWS = 16;  // rows of queries in a tile
constexpr int KEYS = 16;  // keys in a tile

#if defined(HAVE_AMX)

// The kernel grants the tile registers to a process that asks for them.
INLINE bool allowed() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return granted;
}

// Tiles 0-3 accumulate; 4 is a full left operand (32 deep) and 5 a full right one; 6 and 7 are their halves, 16 deep.
INLINE void configure(int rows) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
        uint8_t rows[16] = {};
    } config;
    for (int tile : {0, 1, 2, 3, 4, 6}) config.rows[tile] = uint8_t(rows);
    config.rows[5] = 16, config.rows[7] = 8;
    _tile_loadconfig(&config);
}

INLINE void release() { _tile_release(); }

// scores[row][key] of 16 keys. `k` has a row of `page_size` lanes for each of dim / 2 pairs.
INLINE void score(const uint32_t* q, const uint32_t* k, int dim, int page_size, float* scores, int stride) {
    _tile_zero(0);
    int d = 0;
    for (; d + 16 <= dim / 2; d += 16) {
        _tile_loadd(4, q + d, dim * 2);
        _tile_loadd(5, k + d * page_size, page_size * 4);
        _tile_dpbf16ps(0, 4, 5);
    }
    if (d < dim / 2) {
        _tile_loadd(6, q + d, dim * 2);
        _tile_loadd(7, k + d * page_size, page_size * 4);
        _tile_dpbf16ps(0, 6, 7);
    }
    _tile_stored(0, scores, stride * 4);
}

// out[row][16 * N] = weights x V over `steps` times 16 keys; `v(step)` points at the 8 pairs of keys of a step.
template <int N, class V>
INLINE void weigh(const uint32_t* weights, int weight_stride, int steps, V v, int dim_pad, float* out) {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
    for (int step = 0; step < steps; ++step) {
        const uint32_t* at = v(step);
        _tile_loadd(6, weights + step * 8, weight_stride * 4);
        _tile_loadd(7, at, dim_pad * 4);
        _tile_dpbf16ps(0, 6, 7);
        if constexpr (N > 1) {
            _tile_loadd(7, at + 16, dim_pad * 4);
            _tile_dpbf16ps(1, 6, 7);
        }
        if constexpr (N > 2) {
            _tile_loadd(7, at + 32, dim_pad * 4);
            _tile_dpbf16ps(2, 6, 7);
        }
        if constexpr (N > 3) {
            _tile_loadd(7, at + 48, dim_pad * 4);
            _tile_dpbf16ps(3, 6, 7);
        }
    }
    _tile_stored(0, out, N * 64);
    if constexpr (N > 1) _tile_stored(1, out + 16, N * 64);
    if constexpr (N > 2) _tile_stored(2, out + 32, N * 64);
    if constexpr (N > 3) _tile_stored(3, out + 48, N * 64);
}

#else

INLINE bool allowed() { return false; }
INLINE void release() {}

#endif

template <class T>
INLINE bool usable(const Shape& shape) {
    return sizeof(T) == 2 && shape.dim % 16 == 0 && allowed();
}

}  // namespace amx
