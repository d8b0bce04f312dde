// The paged KV cache: its layout, and the batch that refers to it.
//
// A cache is [pages][kv_heads][K lanes, V lanes], in lanes of 32 bits. A lane holds one float, or a pair of bf16 for
// the pairwise dot product of AVX512-BF16 (`PAIR` elements). Vectors of K run over keys and vectors of V over
// dimensions, so neither needs a horizontal sum:
//   K [dim / PAIR][page_size][PAIR]      pairs of dimensions
//   V [page_size / PAIR][dim_pad][PAIR]  pairs of keys; dim_pad is dim rounded up to whole vectors
// Kept in 8 bits, whole numbers of -127 to 127, the elements lie in the same order.
#pragma once
#include <type_traits>

#include "simd.h"

constexpr int MAX_DIM = 512;

template <class T>
constexpr int PAIR = 4 / int(sizeof(T));

// Keys and values of 8 bits that are multiplied as they are kept, with queries and weights of 16: in lanes of 16 bits,
// else as bf16. Where there are tiles in hardware, those are faster.
struct Whole {
    int16_t bits;
};
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define WHOLE_NUMBERS 1
#endif

template <class T>
using Lane = std::conditional_t<std::is_same_v<T, Whole>, uint16_t, uint32_t>;

struct Shape {
    int32_t heads, kv_heads, dim, page_size, window;  // window 0: none
    float scale;

    int group() const { return heads / kv_heads; }
    int dim_pad() const { return (dim + VL - 1) / VL * VL; }
    template <class T>
    int64_t k_lanes() const { return int64_t(dim / PAIR<T>) * page_size; }
    template <class T>
    int64_t v_lanes() const { return int64_t(page_size / PAIR<T>) * dim_pad(); }
    template <class T>
    int64_t head_lanes() const { return k_lanes<T>() + v_lanes<T>(); }
    template <class T>
    int64_t page_lanes() const { return kv_heads * head_lanes<T>(); }
    template <class T>
    int64_t head_elements() const { return head_lanes<T>() * PAIR<T>; }
};

struct Batch {
    const int32_t *positions, *slots, *query_starts, *context_lens, *page_table;
    int64_t table_stride, tokens, sequences, max_query_len;
};
