// One block of keys against a tile of rows: scores, softmax, weighted values.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "amx.h"

namespace attending {

constexpr int BLOCK = 256;
constexpr int VECTOR_ROWS = REGISTERS == 32 ? 8 : 4;  // rows of a tile that accumulate in vector registers
constexpr int MAX_ROWS = std::max(VECTOR_ROWS, amx::ROWS);
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float INF = std::numeric_limits<float>::infinity();

// ---- dot products of lanes with a broadcast lane

template <class T>
constexpr bool NATIVE = std::is_same_v<T, bf16> && NATIVE_BF16;
template <class T>
constexpr bool WHOLE = std::is_same_v<T, Whole>;
template <class T>
constexpr bool PAIRED = NATIVE<T> || WHOLE<T>;  // an operand is a pair, like a lane
template <class T>
using Operand = std::conditional_t<PAIRED<T>, uint32_t, float>;  // what queries and weights are kept as
template <class T>
constexpr int PER_LANE = PAIRED<T> ? 1 : PAIR<T>;  // operands a lane
template <class T>
using Element = std::conditional_t<WHOLE<T>, bf16, T>;  // of the queries
template <class T>
using Sum = std::conditional_t<WHOLE<T>, vi, vf>;
template <class T>
using Raw = typename VectorOf<Lane<T>, VL>::type;

template <class T>
struct Lanes {
    vf part[PER_LANE<T>];
    INLINE explicit Lanes(vu raw) {
        if constexpr (PER_LANE<T> == 1) {
            part[0] = bits<vf>(raw);
        } else {
            part[0] = bits<vf>(raw << 16);
            part[1] = bits<vf>(raw & 0xffff0000u);
        }
    }
    INLINE static vu first(vu raw) { return raw & 0xffffu; }
    INLINE vf dot(const Operand<T>* with, vf sum) const {
#if defined(__AVX512BF16__)
        if constexpr (NATIVE<T>)
            return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)part[0], (__m512bh)_mm512_set1_epi32(int(*with)));
        else
#endif
        {
            for (int i = 0; i < PER_LANE<T>; ++i) sum = fused(part[i], all(float(with[i])), sum);
            return sum;
        }
    }
};

// Queries as operands; returns what 1 in them is worth.
template <class T>
float pack(const Element<T>* row, int dim, Operand<T>* to) {
    if constexpr (NATIVE<T>)
        std::memcpy(to, row, dim * sizeof(T));
    else
        for (int i = 0; i < dim; ++i) to[i] = to_float(row[i]);
    return 1.0f;
}

// Weights of 0 to 1 as operands, those of keys `i` to `i + VL`.
template <class T>
INLINE void store_weights(Operand<T>* to, int i, vf weights) {
    if constexpr (NATIVE<T>)
        store_float(reinterpret_cast<bf16*>(to) + i, weights);
    else
        store_float(to + i, weights);
}

template <class T>
INLINE vf weighted(Sum<T> values) {  // what a sum of weights times values is worth
    return values;
}

#if defined(WHOLE_NUMBERS)
// Sums of 512 products of 16 and 8 bits fit 32: of keys over MAX_DIM, of values over BLOCK.
constexpr float MOST_16 = 32767.0f;

template <>
struct Lanes<Whole> {
    __m512i numbers;
    INLINE explicit Lanes(Raw<Whole> raw) : numbers(_mm512_cvtepi8_epi16((__m256i)raw)) {}
    INLINE static Raw<Whole> first(Raw<Whole> raw) { return raw & 0xff; }
    INLINE vi dot(const uint32_t* with, vi sum) const {
        return (vi)_mm512_dpwssd_epi32((__m512i)sum, numbers, _mm512_set1_epi32(int(*with)));
    }
};

INLINE void store_16(uint32_t* to, int i, vf x) {
    store(reinterpret_cast<int16_t*>(to) + i, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)x)));
}

// Over the row's largest; where something is not finite, 1 is worth NaN.
template <>
inline float pack<Whole>(const bf16* row, int dim, uint32_t* to) {
    alignas(64) float x[MAX_DIM + VL] = {};
    float most = 0, finite = 0;
    for (int i = 0; i < dim; ++i) {
        x[i] = to_float(row[i]);
        most = std::max(most, __builtin_fabsf(x[i]));
        finite += x[i] * 0.0f;
    }
    const float inverse = most > 0 ? MOST_16 / most : 0.0f;
    for (int i = 0; i < dim; i += VL) store_16(to, i, load<vf>(x + i) * inverse);
    return most / MOST_16 + finite;
}

template <>
INLINE void store_weights<Whole>(uint32_t* to, int i, vf weights) {
    store_16(to, i, weights * MOST_16);
}

template <>
INLINE vf weighted<Whole>(vi values) {
    return __builtin_convertvector(values, vf) * (1 / MOST_16);
}
#endif

// ---- one block of keys against a tile of rows

template <class T>
struct Keys {  // the pages of a block that a tile can see
    const Lane<T>* page[BLOCK / 16];  // K of each page; V lies v_offset lanes behind
    int page_size;
    int64_t v_offset, v_lanes;
    const Lane<T>* ahead[BLOCK / 16];  // those of the block that comes next, if nobody read it before
    int ahead_count;

    // Asks for K or V of the next block, as much of it as is done of this one: from `begin` to `end` of `of` parts.
    INLINE void fetch(int begin, int end, int of, int64_t offset, int64_t lanes) const {
        for (int page = ahead_count * begin / of; page < ahead_count * end / of; ++page)
            for (int64_t i = 0; i < lanes; i += 64 / sizeof(Lane<T>)) __builtin_prefetch(ahead[page] + offset + i, 0, 2);
    }
    INLINE void fetch_keys(int begin, int end, int of) const { fetch(begin, end, of, 0, v_offset); }
    INLINE void fetch_values(int begin, int end, int of) const { fetch(begin, end, of, v_offset, v_lanes); }
};

struct Span {
    int begin, end;
};

struct State {  // running softmax of some rows
    float* top;    // [rows] largest score
    float* total;  // [rows] sum of exp(score - top)
    float* acc;    // [rows][dim_pad] weighted values
};

template <class T, int R, int N>
INLINE void score_strips(const Keys<T>& keys, int first, const Operand<T>* q, int dim, float* scores) {
    const int last = keys.page_size / VL - 1, per_page = last + 1, steps = dim / PAIR<T>;
    const Lane<T>* k[N];
    for (int n = 0; n < N; ++n) k[n] = keys.page[(first + n) / per_page] + (first + n) % per_page * VL;
    Sum<T> acc[R][N] = {};
    for (int i = 0; i < steps; ++i) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            Lanes<T> lanes(load<Raw<T>>(k[n] + i * keys.page_size));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][n] = lanes.dot(q + (r * steps + i) * PER_LANE<T>, acc[r][n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(scores + r * BLOCK + (first + n) * VL, __builtin_convertvector(acc[r][n], vf));
}

// Softmax of `scores[0:count]` within `visible`; the weights outside are 0. `total` 0 and `top` -inf if nothing is
// visible. `scale` is in powers of 2, and so are the tops.
template <class T>
INLINE void weights_of(float* scores, int count, Span visible, float scale, Operand<T>* weights, float* top,
                       float* total) {
    vf highest = all(-INF);
    const vi index = lane_index();
    for (int i = 0; i < count; i += VL) {
        vf x = load<vf>(scores + i);
        if (i < visible.begin || i + VL > visible.end) {
            x = ((index + i >= visible.begin) & (index + i < visible.end)) ? x : all(-INF);
            store(scores + i, x);
        }
        highest = max(x, highest);
    }
    *top = largest(highest) * scale;
    const float reference = *top == -INF ? 0 : *top;
    vf sums = {};
    for (int i = 0; i < count; i += VL) {
        vf e = exp2<sizeof(T) == 2 ? 3 : 6>(load<vf>(scores + i) * scale - reference);
        sums += e;
        store_weights<T>(weights, i, e);
    }
    *total = sum(sums);
}

INLINE vf merged(vf old, float keep, vf fresh, float add) { return fused(old, all(keep), fresh * add); }

template <class T, int R, int N>
INLINE void add_values(const Keys<T>& keys, int count, const Operand<T>* weights, int column, int dim_pad,
                       const float* keep, const float* add, float* state) {
    constexpr int ROW = BLOCK / PAIR<T> * PER_LANE<T>;
    Sum<T> acc[R][N] = {};
    const Operand<T>* w = weights;
    const int pages = (count + keys.page_size - 1) / keys.page_size;
    for (int page = 0; page < pages; ++page) {
        const Lane<T>* v = keys.page[page] + keys.v_offset + column;
        if (column == 0) keys.fetch_values(page, page + 1, pages);
        const int here = std::min(keys.page_size, count - page * keys.page_size);
        for (int i = 0; i < here / PAIR<T>; ++i, v += dim_pad, w += PER_LANE<T>) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Lanes<T> lanes(load<Raw<T>>(v + n * VL));
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r][n] = lanes.dot(w + r * ROW, acc[r][n]);
            }
        }
        if (here % PAIR<T>)  // the pair's second key was never written: whatever is there must not meet a weight of 0
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Lanes<T> lanes(Lanes<T>::first(load<Raw<T>>(v + n * VL)));
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r][n] = lanes.dot(w + r * ROW, acc[r][n]);
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            float* at = state + r * dim_pad + column + n * VL;
            store(at, merged(load<vf>(at), keep[r], weighted<T>(acc[r][n]), add[r]));
        }
}

// How a running maximum and a fresh one scale what belongs to them.
INLINE void rebase(float* top, float* total, float fresh_top, float fresh_total, float* keep, float* add) {
    const float highest = std::max(*top, fresh_top), reference = highest == -INF ? 0 : highest;
    *keep = exp2<6>(all(*top - reference))[0];
    *add = exp2<6>(all(fresh_top - reference))[0];
    *top = highest;
    *total = fused(all(*total), all(*keep), all(fresh_total * *add))[0];
}

template <class T>
struct Tile {  // scratch of one tile of rows
    alignas(64) float scores[MAX_ROWS * BLOCK];
    alignas(64) Operand<T> weights[MAX_ROWS * BLOCK / PAIR<T> * PER_LANE<T>];

    alignas(64) float values[amx::ROWS * 4 * amx::KEYS];

    static constexpr int ROW = BLOCK / PAIR<T> * PER_LANE<T>;  // operands a row of `weights`

    static int rows(const Shape& shape) { return amx::usable<T>(shape) ? amx::ROWS : VECTOR_ROWS; }

    // `keys` holds `count` keys from a page's start on; `visible[r]` is what row r of `rows` sees of them, and `unit[r]`
    // what 1 in its products with keys is worth, in powers of 2.
    void run(const Shape& shape, const Keys<T>& keys, int count, const Span* visible, const Operand<T>* q,
             const float* unit, int rows, State state) {
#if defined(HAVE_AMX)
        if constexpr (std::is_same_v<T, bf16>)
            if (amx::usable<T>(shape)) return with_matrices(shape, keys, count, visible, q, unit, rows, state);
#endif
        (this->*pick(rows, std::make_integer_sequence<int, VECTOR_ROWS>{}))(shape, keys, count, visible, q, unit, state);
    }

  private:
    using Run = void (Tile::*)(const Shape&, const Keys<T>&, int, const Span*, const Operand<T>*, const float*, State);

    template <int... R>
    static Run pick(int rows, std::integer_sequence<int, R...>) {
        static constexpr Run runs[] = {&Tile::template with_vectors<R + 1>...};
        return runs[rows - 1];
    }

    void softmax(int count, const Span* visible, const float* unit, int rows, State state, float* keep, float* add) {
        for (int r = 0; r < rows; ++r) {
            float top, total;
            weights_of<T>(scores + r * BLOCK, count, visible[r], unit[r], weights + r * ROW, &top, &total);
            rebase(state.top + r, state.total + r, top, total, keep + r, add + r);
        }
    }

    template <int R>
    void with_vectors(const Shape& shape, const Keys<T>& keys, int count, const Span* visible, const Operand<T>* q,
                      const float* unit, State state) {
        constexpr int WIDE = REGISTERS == 32 ? (R <= 4 ? 4 : 2) : (R <= 2 && PAIR<T> == 1 ? 4 : 2);
        const int strips = (count + VL - 1) / VL;
        int strip = 0;
        for (; strip + WIDE <= strips; strip += WIDE) {
            keys.fetch_keys(strip, strip + WIDE, strips);
            score_strips<T, R, WIDE>(keys, strip, q, shape.dim, scores);
        }
        keys.fetch_keys(strip, strips, strips);
        if constexpr (WIDE == 4)
            if (strip + 2 <= strips) score_strips<T, R, 2>(keys, strip, q, shape.dim, scores), strip += 2;
        if (strip < strips) score_strips<T, R, 1>(keys, strip, q, shape.dim, scores);

        float keep[R], add[R];
        softmax(strips * VL, visible, unit, R, state, keep, add);

        const int dim_pad = shape.dim_pad();
        int column = 0;
        for (; column + WIDE * VL <= dim_pad; column += WIDE * VL)
            add_values<T, R, WIDE>(keys, count, weights, column, dim_pad, keep, add, state.acc);
        if constexpr (WIDE == 4)
            if (column + 2 * VL <= dim_pad)
                add_values<T, R, 2>(keys, count, weights, column, dim_pad, keep, add, state.acc), column += 2 * VL;
        if (column < dim_pad) add_values<T, R, 1>(keys, count, weights, column, dim_pad, keep, add, state.acc);
    }

#if defined(HAVE_AMX)
    void with_matrices(const Shape& shape, const Keys<T>& keys, int count, const Span* visible, const Operand<T>* q,
                       const float* unit, int rows, State state) {
        const int steps = (count + amx::KEYS - 1) / amx::KEYS, per_page = keys.page_size / amx::KEYS;
        const int dim_pad = shape.dim_pad();
        amx::configure(rows);
        for (int step = 0; step < steps; ++step) {
            const uint32_t* page = keys.page[step / per_page];
            keys.fetch_keys(step, step + 1, steps);
            const uint32_t* k = page + step % per_page * amx::KEYS;
            amx::score(q, k, shape.dim, keys.page_size, scores + step * amx::KEYS, BLOCK);
        }
        float keep[amx::ROWS], add[amx::ROWS];
        softmax(steps * amx::KEYS, visible, unit, rows, state, keep, add);

        alignas(64) uint32_t tail[amx::KEYS / 2 * MAX_DIM];
        const int whole = count / amx::KEYS;
        auto v_of = [&](int step) {
            return keys.page[step / per_page] + keys.v_offset + step % per_page * (amx::KEYS / 2) * dim_pad;
        };
        if (whole < steps) {  // what was never written must not meet a weight of 0
            const int lanes = (count - whole * amx::KEYS) / 2 * dim_pad, half = count % 2 * dim_pad;
            std::memcpy(tail, v_of(whole), lanes * 4);
            for (int i = lanes; i < lanes + half; ++i) tail[i] = v_of(whole)[i] & 0xffffu;
            std::fill(tail + lanes + half, tail + amx::KEYS / 2 * dim_pad, 0u);
        }
        for (int column = 0; column < dim_pad; column += 64) {
            auto v = [&](int step) {
                if (column == 0) keys.fetch_values(step, step + 1, steps);
                return (step < whole ? v_of(step) : tail) + column;
            };
            const int vectors = std::min(4, (dim_pad - column) / VL);
            auto weigh = vectors == 1   ? &amx::weigh<1, decltype(v)>
                         : vectors == 2 ? &amx::weigh<2, decltype(v)>
                         : vectors == 3 ? &amx::weigh<3, decltype(v)>
                                        : &amx::weigh<4, decltype(v)>;
            weigh(weights, ROW, steps, v, dim_pad, values);
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < vectors * VL; i += VL) {
                    float* at = state.acc + r * dim_pad + column + i;
                    store(at, merged(load<vf>(at), keep[r], load<vf>(values + r * vectors * VL + i), add[r]));
                }
        }
    }
#endif
};

}  // namespace attending
