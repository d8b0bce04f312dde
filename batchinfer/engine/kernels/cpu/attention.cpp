// Causal grouped-query attention over the paged cache: prefill, decode and any mixture in one call.
//
// A work item is a run of query positions of one sequence and one KV head; its rows are positions x group, so that a
// load of K or V serves up to MAX_ROWS rows. Keys come in blocks of BLOCK at fixed places in the sequence; each block
// gets its own softmax and is then merged into the row's running state. Every row thus sees the same arithmetic,
// whichever rows share its tile, its item or its batch, and whether or not blocks were handed to different threads.
#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#include <vector>

#include "paged.h"

namespace {

constexpr int BLOCK = 256;
constexpr int MAX_ROWS = REGISTERS == 32 ? 8 : 4;
constexpr int ITEM_ROWS = 64;  // enough to amortise reading a block from the L2 cache
constexpr float INF = std::numeric_limits<float>::infinity();

// ---- dot products of lanes with a broadcast lane

template <class T>
constexpr bool NATIVE = std::is_same_v<T, bf16> && NATIVE_BF16;
template <class T>
using Operand = std::conditional_t<NATIVE<T>, uint32_t, float>;  // what queries and weights are kept as
template <class T>
constexpr int PER_LANE = NATIVE<T> ? 1 : PAIR<T>;  // operands a lane

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
    INLINE vf dot(const Operand<T>* with, vf sum) const {
#if defined(__AVX512BF16__)
        if constexpr (NATIVE<T>)
            return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)part[0], (__m512bh)_mm512_set1_epi32(int(*with)));
        else
#endif
        {
            for (int i = 0; i < PER_LANE<T>; ++i) sum += part[i] * float(with[i]);
            return sum;
        }
    }
};

template <class T>
void pack(const T* row, int dim, Operand<T>* to) {
    if constexpr (NATIVE<T>)
        std::memcpy(to, row, dim * sizeof(T));
    else
        for (int i = 0; i < dim; ++i) to[i] = to_float(row[i]);
}

// ---- one block of keys against a tile of rows

struct Keys {  // the pages of a block that a tile can see
    const uint32_t* page[BLOCK / 16];  // K of each page; V lies v_offset lanes behind
    int page_size;
    int64_t v_offset, v_lanes;
    bool fetch;  // nobody read this block before: ask for V while K is worked on, and for `ahead` while V is
    const uint32_t* ahead[BLOCK / 16];  // K of the block that comes next
    int ahead_count;
};

INLINE void prefetch(const uint32_t* from, int64_t lanes) {
    for (int64_t i = 0; i < lanes; i += 16) __builtin_prefetch(from + i, 0, 2);
}

struct Span {
    int begin, end;
};

struct State {  // running softmax of some rows
    float* top;    // [rows] largest score
    float* total;  // [rows] sum of exp(score - top)
    float* acc;    // [rows][dim_pad] weighted values
};

template <class T, int R, int N>
INLINE void score_strips(const Keys& keys, int first, const Operand<T>* q, int dim, float* scores) {
    const int last = keys.page_size / VL - 1, per_page = last + 1, steps = dim / PAIR<T>;
    const uint32_t* k[N];
    for (int n = 0; n < N; ++n) k[n] = keys.page[(first + n) / per_page] + (first + n) % per_page * VL;
    vf acc[R][N] = {};
    for (int i = 0; i < steps; ++i) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            Lanes<T> lanes(load<vu>(k[n] + i * keys.page_size));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][n] = lanes.dot(q + (r * steps + i) * PER_LANE<T>, acc[r][n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(scores + r * BLOCK + (first + n) * VL, acc[r][n]);
}

// Softmax of `scores[0:count]` within `visible`; the weights outside are 0. `total` 0 and `top` -inf if nothing is visible.
template <class T>
INLINE void weights_of(float* scores, int count, Span visible, float scale, Operand<T>* weights, float* top,
                       float* total) {
    vf highest = all(-INF);
    const vi index = lane_index();
    for (int i = 0; i < count; i += VL) {
        vf x = load<vf>(scores + i) * scale;
        if (i < visible.begin || i + VL > visible.end)
            x = ((index + i >= visible.begin) & (index + i < visible.end)) ? x : all(-INF);
        store(scores + i, x);
        highest = max(x, highest);
    }
    *top = largest(highest);
    const float reference = *top == -INF ? 0 : *top;
    vf sums = {};
    for (int i = 0; i < count; i += VL) {
        vf e = exp(load<vf>(scores + i) - reference);
        sums += e;
        if constexpr (NATIVE<T>)
            store_float(reinterpret_cast<bf16*>(weights) + i, e);
        else
            store_float(weights + i, e);
    }
    *total = sum(sums);
}

INLINE vf merged(vf old, float keep, vf fresh, float add) { return old * keep + fresh * add; }

template <class T, int R, int N>
INLINE void add_values(const Keys& keys, int count, const Operand<T>* weights, int column, int dim_pad,
                       const float* keep, const float* add, float* state) {
    constexpr int ROW = BLOCK / PAIR<T> * PER_LANE<T>;
    vf acc[R][N] = {};
    const Operand<T>* w = weights;
    for (int page = 0; page * keys.page_size < count; ++page) {
        const uint32_t* v = keys.page[page] + keys.v_offset + column;
        if (column == 0 && page < keys.ahead_count) prefetch(keys.ahead[page], keys.v_offset);
        const int here = std::min(keys.page_size, count - page * keys.page_size);
        for (int i = 0; i < here / PAIR<T>; ++i, v += dim_pad, w += PER_LANE<T>) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Lanes<T> lanes(load<vu>(v + n * VL));
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r][n] = lanes.dot(w + r * ROW, acc[r][n]);
            }
        }
        if (here % PAIR<T>)  // the pair's second key was never written: whatever is there must not meet a weight of 0
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Lanes<T> lanes(load<vu>(v + n * VL) & 0xffffu);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r][n] = lanes.dot(w + r * ROW, acc[r][n]);
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            float* at = state + r * dim_pad + column + n * VL;
            store(at, merged(load<vf>(at), keep[r], acc[r][n], add[r]));
        }
}

// How a running maximum and a fresh one scale what belongs to them.
INLINE void rebase(float* top, float* total, float fresh_top, float fresh_total, float* keep, float* add) {
    const float highest = std::max(*top, fresh_top), reference = highest == -INF ? 0 : highest;
    *keep = exp(*top - reference);
    *add = exp(fresh_top - reference);
    *top = highest;
    *total = *total * *keep + fresh_total * *add;
}

template <class T>
struct Tile {  // scratch of one tile of rows
    alignas(64) float scores[MAX_ROWS * BLOCK];
    alignas(64) Operand<T> weights[MAX_ROWS * BLOCK / PAIR<T> * PER_LANE<T>];

    using Run = void (Tile::*)(const Shape&, const Keys&, int, const Span*, const Operand<T>*, State);

    // `keys` holds `count` keys from a page's start on; `visible[r]` is what row r sees of them.
    template <int R>
    void run(const Shape& shape, const Keys& keys, int count, const Span* visible, const Operand<T>* q, State state) {
        constexpr int WIDE = REGISTERS == 32 ? (R <= 4 ? 4 : 2) : (R <= 2 && PAIR<T> == 1 ? 4 : 2);
        const int strips = (count + VL - 1) / VL;
        int strip = 0;
        for (; strip + WIDE <= strips; strip += WIDE) {
            if (keys.fetch)
                for (int page = strip * VL / keys.page_size; page * keys.page_size < (strip + WIDE) * VL; ++page)
                    if (strip * VL <= page * keys.page_size) prefetch(keys.page[page] + keys.v_offset, keys.v_lanes);
            score_strips<T, R, WIDE>(keys, strip, q, shape.dim, scores);
        }
        if constexpr (WIDE == 4)
            if (strip + 2 <= strips) score_strips<T, R, 2>(keys, strip, q, shape.dim, scores), strip += 2;
        if (strip < strips) score_strips<T, R, 1>(keys, strip, q, shape.dim, scores);

        float keep[R], add[R];
        constexpr int ROW = BLOCK / PAIR<T> * PER_LANE<T>;
        for (int r = 0; r < R; ++r) {
            float top, total;
            weights_of<T>(scores + r * BLOCK, strips * VL, visible[r], shape.scale, weights + r * ROW, &top, &total);
            rebase(state.top + r, state.total + r, top, total, keep + r, add + r);
        }

        const int dim_pad = shape.dim_pad();
        int column = 0;
        for (; column + WIDE * VL <= dim_pad; column += WIDE * VL)
            add_values<T, R, WIDE>(keys, count, weights, column, dim_pad, keep, add, state.acc);
        if constexpr (WIDE == 4)
            if (column + 2 * VL <= dim_pad)
                add_values<T, R, 2>(keys, count, weights, column, dim_pad, keep, add, state.acc), column += 2 * VL;
        if (column < dim_pad) add_values<T, R, 1>(keys, count, weights, column, dim_pad, keep, add, state.acc);
    }

    template <int... R>
    static Run pick(int rows, std::integer_sequence<int, R...>) {
        static constexpr Run runs[] = {&Tile::template run<R + 1>...};
        return runs[rows - 1];
    }
};

// ---- work items

struct Item {
    int sequence, kv_head, first, last;  // query rows [first, last) of the sequence
    int64_t cost;
};

struct Unit {
    const Item* item;
    Span blocks;
    int64_t state;  // offset of its partial state
};

template <class T>
struct Attention {
    const Shape& shape;
    const Batch& batch;
    const T* q;
    const uint32_t* cache;
    T* out;

    int rows(const Item& item) const { return (item.last - item.first) * shape.group(); }
    int64_t state_floats(int rows) const { return int64_t(rows) * (shape.dim_pad() + 2 + VL) / VL * VL + VL; }

    State state_at(float* memory, int rows) const {
        float* acc = memory;
        return {acc + int64_t(rows) * shape.dim_pad(), acc + int64_t(rows) * shape.dim_pad() + rows, acc};
    }

    Span visible(int sequence, int query) const {  // of a query row of the sequence, in positions
        const int queries = batch.query_starts[sequence + 1] - batch.query_starts[sequence];
        const int end = batch.context_lens[sequence] - queries + query + 1;
        return {shape.window ? std::max(0, end - shape.window) : 0, end};
    }

    Span blocks(const Item& item) const {
        return {visible(item.sequence, item.first).begin / BLOCK,
                (visible(item.sequence, item.last - 1).end + BLOCK - 1) / BLOCK};
    }

    std::vector<Item> items() const {
        std::vector<Item> items;
        const int step = std::max(1, ITEM_ROWS / shape.group());
        for (int s = 0; s < batch.sequences; ++s) {
            const int queries = batch.query_starts[s + 1] - batch.query_starts[s];
            for (int first = 0; first < queries; first += step) {
                const int last = std::min(queries, first + step);
                const int64_t keys = visible(s, last - 1).end - visible(s, first).begin;
                for (int h = 0; h < shape.kv_heads; ++h) items.push_back({s, h, first, last, (last - first + 1) * keys});
            }
        }
        return items;
    }

    const uint32_t* page_of(const Item& item, int page) const {
        return cache + batch.page_table[item.sequence * batch.table_stride + page] * shape.page_lanes<T>() +
               item.kv_head * shape.head_lanes<T>();
    }

    // Attention of the unit's rows to its blocks of keys, into an empty state; then `next` is what the thread will do.
    void run(const Unit& unit, const Unit* next, State state, Operand<T>* queries, Tile<T>& tile) const {
        const Item& item = *unit.item;
        const Span blocks = unit.blocks;
        const int group = shape.group(), total = rows(item), dim = shape.dim;
        std::fill_n(state.top, total, -INF);
        std::fill_n(state.total, total, 0.0f);
        std::fill_n(state.acc, int64_t(total) * shape.dim_pad(), 0.0f);
        const int64_t row = int64_t(shape.heads) * dim;
        for (int i = 0; i < total; ++i)
            pack(q + (batch.query_starts[item.sequence] + item.first + i / group) * row +
                     (item.kv_head * group + i % group) * dim,
                 dim, queries + i * dim / PAIR<T> * PER_LANE<T>);

        const int page_size = shape.page_size;
        Keys keys{{}, page_size, shape.k_lanes<T>(), shape.v_lanes<T>(), false, {}, 0};
        for (int block = blocks.begin; block < blocks.end; ++block)
            for (int first = 0; first < total; first += MAX_ROWS) {
                const int count = std::min(MAX_ROWS, total - first);
                const int begin = std::max(block * BLOCK, visible(item.sequence, item.first + first / group).begin);
                const int end = std::min((block + 1) * BLOCK,
                                         visible(item.sequence, item.first + (first + count - 1) / group).end);
                if (begin >= end) continue;
                const int page = begin / page_size, start = page * page_size;
                for (int i = 0; start + i * page_size < end; ++i)
                    keys.page[i] = page_of(item, page + i);
                keys.fetch = total <= MAX_ROWS;
                keys.ahead_count = 0;
                if (keys.fetch) {
                    const bool same = block + 1 < blocks.end;
                    const Unit* after = same ? &unit : next;
                    if (after) {
                        const Span seen = {visible(after->item->sequence, after->item->first).begin,
                                           visible(after->item->sequence, after->item->last - 1).end};
                        const int at = same ? block + 1 : after->blocks.begin;
                        const int from = std::max(at * BLOCK, seen.begin) / page_size;
                        const int to = (std::min((at + 1) * BLOCK, seen.end) + page_size - 1) / page_size;
                        for (int i = from; i < to; ++i) keys.ahead[keys.ahead_count++] = page_of(*after->item, i);
                    }
                }
                Span spans[MAX_ROWS];
                for (int r = 0; r < count; ++r) {
                    Span span = visible(item.sequence, item.first + (first + r) / group);
                    spans[r] = {span.begin - start, std::min(span.end, end) - start};
                }
                auto step = Tile<T>::pick(count, std::make_integer_sequence<int, MAX_ROWS>{});
                (tile.*step)(shape, keys, end - start, spans, queries + first * dim / PAIR<T> * PER_LANE<T>,
                             {state.top + first, state.total + first, state.acc + int64_t(first) * shape.dim_pad()});
            }
    }

    void merge(State into, const State& from, int rows) const {
        const int dim_pad = shape.dim_pad();
        for (int r = 0; r < rows; ++r) {
            float keep, add;
            rebase(into.top + r, into.total + r, from.top[r], from.total[r], &keep, &add);
            for (int i = 0; i < dim_pad; i += VL) {
                float* at = into.acc + r * dim_pad + i;
                store(at, merged(load<vf>(at), keep, load<vf>(from.acc + r * dim_pad + i), add));
            }
        }
    }

    void finish(const Item& item, const State& state) const {
        const int group = shape.group(), dim = shape.dim, dim_pad = shape.dim_pad();
        for (int r = 0; r < rows(item); ++r) {
            T* to = out + ((batch.query_starts[item.sequence] + item.first + r / group) * int64_t(shape.heads) +
                           item.kv_head * group + r % group) * dim;
            const float scale = 1.0f / state.total[r];
            const float* from = state.acc + int64_t(r) * dim_pad;
            int i = 0;
            for (; i + VL <= dim; i += VL) store_float(to + i, load<vf>(from + i) * scale);
            for (; i < dim; ++i) from_float(to + i, from[i] * scale);
        }
    }

    void run_all(int threads) const;
};

struct Memory {  // grows, stays with its thread
    float* data = nullptr;
    int64_t size = 0;
    float* at_least(int64_t floats) {
        if (floats > size) {
            ::operator delete(data, std::align_val_t(64));
            data = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
            size = floats;
        }
        return data;
    }
    ~Memory() { ::operator delete(data, std::align_val_t(64)); }
};

template <class T>
void Attention<T>::run_all(int threads) const {
    auto work = items();
    int64_t cost = 0, dearest = 0, most_rows = 0;
    for (const Item& item : work) {
        cost += item.cost;
        dearest = std::max(dearest, item.cost);
        most_rows = std::max<int64_t>(most_rows, rows(item));
    }
    // Longest first, where one item could keep a thread busy after the others are done.
    if (threads > 1 && dearest * threads * 8 > cost)
        std::sort(work.begin(), work.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });

    std::vector<Unit> units;
    int64_t partial = 0;
    if (threads > 1 && dearest * threads > cost) {  // too few items to go round: their blocks become the units
        for (const Item& item : work) {
            const Span all = blocks(item);
            for (int b = all.begin; b < all.end; ++b) {
                units.push_back({&item, {b, b + 1}, partial});
                partial += state_floats(rows(item));
            }
        }
    }
    const bool split = units.size() > work.size();
    if (!split) {
        units.clear();
        for (const Item& item : work) units.push_back({&item, blocks(item), 0});
    }
    static thread_local Memory shared;
    float* partials = split ? shared.at_least(partial) : nullptr;
    const int64_t query_floats = (most_rows * shape.dim + 15) / 16 * 16;

    std::atomic<size_t> taken{0};
#pragma omp parallel num_threads(threads) if (units.size() > 1)
    {
        static thread_local Memory own;
        static thread_local Tile<T> tile;
        float* memory = own.at_least(query_floats + state_floats(most_rows));
        auto* queries = reinterpret_cast<Operand<T>*>(memory);
        // A thread takes its next unit one ahead, so that it knows what to prefetch.
        for (size_t u = taken++, next; u < units.size(); u = next) {
            next = taken++;
            const Unit& unit = units[u];
            State state = state_at(split ? partials + unit.state : memory + query_floats, rows(*unit.item));
            run(unit, next < units.size() ? &units[next] : nullptr, state, queries, tile);
            if (!split) finish(*unit.item, state);
        }
        if (split) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
            for (size_t u = 0; u < units.size(); ++u) {
                const Item* item = units[u].item;
                if (u && units[u - 1].item == item) continue;
                State state = state_at(partials + units[u].state, rows(*item));
                for (size_t next = u + 1; next < units.size() && units[next].item == item; ++next)
                    merge(state, state_at(partials + units[next].state, rows(*item)), rows(*item));
                finish(*item, state);
            }
        }
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                      \
    EXPORTED void attend_##suffix(const Shape* shape, const Batch* batch, const T* q, const uint32_t* cache, \
                                    T* out, int threads) {                                                     \
        Attention<T>{*shape, *batch, q, cache, out}.run_all(threads);                                          \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
