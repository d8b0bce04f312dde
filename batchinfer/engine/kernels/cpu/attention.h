// Causal grouped-query attention over the paged cache: prefill, decode and any mixture in one call.
//
// A work item is a run of query positions of one sequence and one KV head; its rows are positions x group, so that a
// load of K or V serves a tile of rows. Keys come in blocks of BLOCK at fixed places in the sequence; each block
// gets its own softmax and is then merged into the row's running state. Every row thus sees the same arithmetic,
// whichever rows share its tile, its item or its batch, and whether or not blocks were handed to different threads.
#pragma once
#include <algorithm>
#include <new>
#include <vector>

#include "team.h"
#include "tile.h"

namespace attending {

constexpr int ITEM_ROWS = 64;  // enough to amortise reading a block from the L2 cache

struct Item {
    int sequence, kv_head, first, last;  // query rows [first, last) of the sequence
    int64_t cost;
};

struct Unit {
    const Item* item;
    Span blocks;
    int64_t state;  // offset of its partial state
};

// The work of a step, which is the same in each of its layers.
struct Dealt {
    std::vector<Item> items;
    std::vector<Unit> units;
    bool split = false;  // units are blocks of an item
    int64_t partial = 0, most_rows = 0;  // floats of the partial states of units; rows of the largest item
};

template <class T, class Kept>
struct Attention {
    const Shape& shape;
    const Batch& batch;
    const T* q;
    const Kept* cache;
    T* out;

    static constexpr bool NARROW = !std::is_same_v<T, Kept>;
#if defined(WHOLE_NUMBERS)
    using Worked = std::conditional_t<NARROW && std::is_same_v<T, bf16>, Whole, T>;
#else
    using Worked = T;
#endif
    static constexpr bool WIDENS = NARROW && !WHOLE<Worked>;  // a block of keys becomes T before it is worked on

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

    const Kept* kept_page(const Item& item, int page) const {
        const int64_t number = batch.page_table[item.sequence * batch.table_stride + page];
        return cache + (number * shape.kv_heads + item.kv_head) * shape.head_elements<T>();
    }

    const Lane<Worked>* page_of(const Item& item, int page) const {
        return reinterpret_cast<const Lane<Worked>*>(kept_page(item, page));
    }

    int64_t room_floats() const { return WIDENS ? BLOCK / shape.page_size * shape.head_lanes<T>() : 0; }

    // The pages of some keys as T, one after another.
    void widen(const Item& item, Span keys, float* room) const {
        const int first = keys.begin / shape.page_size, last = (keys.end + shape.page_size - 1) / shape.page_size;
        T* to = reinterpret_cast<T*>(room);
        for (int page = first; page < last; ++page) {
            const Kept* from = kept_page(item, page);
            for (int64_t i = 0; i < shape.head_elements<T>(); i += VL, to += VL)
                store_float(to, __builtin_convertvector(load<typename VectorOf<int8_t, VL>::type>(from + i), vf));
        }
    }

    // Attention of the unit's rows to its blocks of keys, into an empty state; then `next` is what the thread will do.
    void run(const Unit& unit, const Unit* next, State state, Operand<Worked>* queries, float* units, float* room,
             Tile<Worked>& tile) const {
        const Item& item = *unit.item;
        const Span blocks = unit.blocks;
        const int group = shape.group(), total = rows(item), dim = shape.dim;
        std::fill_n(state.top, total, -INF);
        std::fill_n(state.total, total, 0.0f);
        std::fill_n(state.acc, int64_t(total) * shape.dim_pad(), 0.0f);
        const int64_t row = int64_t(shape.heads) * dim;
        for (int i = 0; i < total; ++i)
            units[i] = shape.scale * LOG2_E *
                       pack<Worked>(q + (batch.query_starts[item.sequence] + item.first + i / group) * row +
                                        (item.kv_head * group + i % group) * dim,
                                    dim, queries + i * dim / PAIR<T> * PER_LANE<Worked>);

        const int page_size = shape.page_size, tile_rows = Tile<Worked>::rows(shape);
        Keys<Worked> keys{{}, page_size, shape.k_lanes<T>(), shape.v_lanes<T>(), {}, 0};
        for (int block = blocks.begin; block < blocks.end; ++block) {
            const Span seen = {std::max(block * BLOCK, visible(item.sequence, item.first).begin),
                               std::min((block + 1) * BLOCK, visible(item.sequence, item.last - 1).end)};
            if constexpr (WIDENS) widen(item, seen, room);
            for (int first = 0; first < total; first += tile_rows) {
                const int count = std::min(tile_rows, total - first);
                const int begin = std::max(block * BLOCK, visible(item.sequence, item.first + first / group).begin);
                const int end = std::min((block + 1) * BLOCK,
                                         visible(item.sequence, item.first + (first + count - 1) / group).end);
                if (begin >= end) continue;
                const int page = begin / page_size, start = page * page_size;
                for (int i = 0; start + i * page_size < end; ++i)
                    if constexpr (WIDENS)
                        keys.page[i] = reinterpret_cast<const uint32_t*>(room) +
                                       (page + i - seen.begin / page_size) * shape.head_lanes<T>();
                    else
                        keys.page[i] = page_of(item, page + i);
                keys.ahead_count = 0;
                if (!WIDENS && total <= tile_rows) {
                    const bool same = block + 1 < blocks.end;
                    const Unit* after = same ? &unit : next;
                    if (after) {
                        const Span then = {visible(after->item->sequence, after->item->first).begin,
                                           visible(after->item->sequence, after->item->last - 1).end};
                        const int at = same ? block + 1 : after->blocks.begin;
                        const int from = std::max(at * BLOCK, then.begin) / page_size;
                        const int to = (std::min((at + 1) * BLOCK, then.end) + page_size - 1) / page_size;
                        for (int i = from; i < to; ++i) keys.ahead[keys.ahead_count++] = page_of(*after->item, i);
                    }
                }
                Span spans[MAX_ROWS];
                for (int r = 0; r < count; ++r) {
                    Span span = visible(item.sequence, item.first + (first + r) / group);
                    spans[r] = {span.begin - start, std::min(span.end, end) - start};
                }
                tile.run(shape, keys, end - start, spans, queries + first * dim / PAIR<T> * PER_LANE<Worked>,
                         units + first, count,
                         {state.top + first, state.total + first, state.acc + int64_t(first) * shape.dim_pad()});
            }
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

    Dealt deal(int threads) const;
    void work_off(const Dealt& dealt, float* partials, Team& team) const;
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

template <class T, class Kept>
Dealt Attention<T, Kept>::deal(int threads) const {
    Dealt dealt;
    auto& [work, units, split, partial, most_rows] = dealt;
    work = items();
    int64_t cost = 0, dearest = 0;
    for (const Item& item : work) {
        cost += item.cost;
        dearest = std::max(dearest, item.cost);
        most_rows = std::max<int64_t>(most_rows, rows(item));
    }
    // Longest first, where one item could keep a thread busy after the others are done.
    if (threads > 1 && dearest * threads * 8 > cost)
        std::sort(work.begin(), work.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });

    if (threads > 1 && dearest * threads > cost) {  // too few items to go round: their blocks become the units
        for (const Item& item : work) {
            const Span all = blocks(item);
            for (int b = all.begin; b < all.end; ++b) {
                units.push_back({&item, {b, b + 1}, partial});
                partial += state_floats(rows(item));
            }
        }
    }
    split = units.size() > work.size();
    if (!split) {
        units.clear();
        for (const Item& item : work) units.push_back({&item, blocks(item), 0});
    }
    return dealt;
}

// By all threads of a parallel region. `partials` is memory for `dealt.partial`.
template <class T, class Kept>
void Attention<T, Kept>::work_off(const Dealt& dealt, float* partials, Team& team) const {
    const auto& units = dealt.units;
    const int64_t query_floats = (dealt.most_rows * shape.dim + 15) / 16 * 16;
    const int64_t unit_floats = (dealt.most_rows + 15) / 16 * 16;
    static thread_local Memory own;
    static thread_local Tile<Worked> tile;
    float* memory = own.at_least(query_floats + unit_floats + state_floats(dealt.most_rows) + room_floats());
    float* units_of = memory + query_floats;
    float* mine = units_of + unit_floats;
    float* room = mine + state_floats(dealt.most_rows);
    auto* queries = reinterpret_cast<Operand<Worked>*>(memory);
    team.deal(units.size(), [&](int64_t u, int64_t next) {
        const Unit& unit = units[u];
        State state = state_at(dealt.split ? partials + unit.state : mine, rows(*unit.item));
        run(unit, next >= 0 ? &units[next] : nullptr, state, queries, units_of, room, tile);
        if (!dealt.split) finish(*unit.item, state);
    });
    if (amx::usable<Worked>(shape)) amx::release();
    if (dealt.split) {
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

// Made once, in attention.cpp, for all who attend.
#define ATTENDING(EXTERN, T, Kept)                                     \
    EXTERN template Dealt Attention<T, Kept>::deal(int threads) const; \
    EXTERN template void Attention<T, Kept>::work_off(const Dealt&, float*, Team&) const;
ATTENDING(extern, bf16, bf16)
ATTENDING(extern, bf16, int8_t)

}  // namespace attending
