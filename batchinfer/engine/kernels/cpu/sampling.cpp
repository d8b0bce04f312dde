// Argmax, filters and the draw; a row is one thread's work and knows nothing of the other rows.
#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t BLOCK = 4 * VL;  // looked at value by value only if its largest is worth it
constexpr int CHUNK = 1024;  // summed in float, the sums of chunks in double
static_assert(CHUNK % BLOCK == 0);

struct Sampling {  // arrays with one entry a row, as in the Python class of that name
    const float* temperature;
    const int32_t* top_k;
    const float *top_p, *min_p, *repetition_penalty;
    const int64_t* seed;
    const int32_t* index;
    const int64_t* position;
    const int32_t* history;
    const int32_t *history_rows, *history_lens;
    int64_t history_stride;
    int32_t all_greedy;
};

// ---- the uniform number of (seed, index, position): bit for bit that of the reference

uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

double uniform(int64_t seed, int32_t index, int64_t position) {
    uint64_t bits = splitmix64(uint64_t(seed));
    bits = splitmix64(bits ^ uint64_t(int64_t(index)));
    bits = splitmix64(bits ^ uint64_t(position));
    return double(bits >> 11) * 0x1p-53;
}

// ---- argmax

template <class T>
float largest_in(const T* x, int64_t n) {  // NaN counts as -inf
    vf best[4] = {all(-INF), all(-INF), all(-INF), all(-INF)};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int k = 0; k < 4; ++k) best[k] = max(load_float(x + i + k * VL), best[k]);
    float result = largest(max(max(best[0], best[1]), max(best[2], best[3])));
    for (; i < n; ++i) result = std::max(result, to_float(x[i]));  // keeps `result` where x[i] is NaN
    return result;
}

template <class T>
int32_t argmax(const T* x, int64_t n) {
    float best = -INF;
    int64_t from = -1;
    for (int64_t start = 0; start < n; start += CHUNK)
        if (float top = largest_in(x + start, std::min<int64_t>(CHUNK, n - start)); top > best) best = top, from = start;
    if (from < 0) return -1;
    while (to_float(x[from]) != best) ++from;
    return int32_t(from);
}

// ---- threshold search: bisection over the bit patterns of floats, so exact, and nothing is ever sorted

int32_t rank_of(float x) {  // orders as the floats do
    int32_t i = bits<int32_t>(x);
    return i >= 0 ? i : i ^ 0x7fffffff;
}
float of_rank(int32_t i) { return bits<float>(i >= 0 ? i : i ^ 0x7fffffff); }

enum class Measure { COUNT, SUM };

// Measure of all values that are at least `low`; n is a multiple of VL.
template <Measure M>
double measure(const float* values, int64_t n, float low) {
    double total = 0;
    for (int64_t start = 0; start < n; start += CHUNK) {
        vf sums[2] = {};
        const int64_t end = std::min(n, start + CHUNK);
        for (int64_t i = start; i < end; i += VL) {
            vf v = load<vf>(values + i);
            sums[i / VL % 2] += v >= low ? (M == Measure::SUM ? v : all(1.0f)) : vf{};
        }
        total += sum(sums[0] + sums[1]);
    }
    return total;
}

// The largest t for which the values >= t measure at least `wanted`; `floor` is an answer that always does.
template <Measure M>
float threshold(const float* values, int64_t n, double wanted, float floor, float top, std::vector<float>& scratch) {
    int64_t low = rank_of(floor), high = int64_t(rank_of(top)) + 1;
    double above = 0;  // measure of the values that are out of `values` because they are >= high
    for (int step = 1; high - low > 1; ++step) {
        const int64_t middle = low + (high - low) / 2;
        (above + measure<M>(values, n, of_rank(int32_t(middle))) >= wanted ? low : high) = middle;
        if (step % 8 == 0 && n > 4 * VL) {  // go on with what is still undecided
            if (high <= rank_of(top)) above += measure<M>(values, n, of_rank(int32_t(high)));
            const float from = of_rank(int32_t(low)), to = high <= rank_of(top) ? of_rank(int32_t(high)) : INF;
            scratch.resize(std::max<size_t>(scratch.size(), n + VL));
            int64_t kept = 0;
            for (int64_t i = 0; i < n; ++i) {
                const float v = values[i];
                scratch[kept] = v;
                kept += (v >= from) & (v < to);
            }
            for (; kept % VL; ++kept) scratch[kept] = -INF;
            values = scratch.data();
            n = kept;
        }
    }
    return of_rank(int32_t(low));
}

// ---- one row

struct Row {
    std::vector<float> values, scratch;  // values: logits, later weights; ends with a whole vector
    std::vector<int32_t> ids;            // token of each value; empty: value i is of token i
    int64_t n;                           // multiple of VL

    template <class T>
    void read(const T* logits, int64_t vocabulary) {
        ids.clear();
        n = (vocabulary + VL - 1) / VL * VL;
        values.resize(n);
        int64_t i = 0;
        for (; i + VL <= vocabulary; i += VL) {
            vf x = load_float(logits + i);
            store(&values[i], x == x ? x : all(-INF));
        }
        for (; i < n; ++i) {
            const float x = i < vocabulary ? to_float(logits[i]) : -INF;
            values[i] = x == x ? x : -INF;
        }
    }

    // Each token once, however often it occurs: the new value is always made from the old logit.
    template <class T>
    void penalise(const T* logits, int64_t vocabulary, const int32_t* history, int64_t length, float penalty) {
        for (int64_t i = 0; i < length; ++i) {
            const int64_t token = history[i];
            if (token < 0 || token >= vocabulary) continue;
            const float x = to_float(logits[token]);
            if (x == x) values[token] = x > 0 ? x / penalty : x * penalty;
        }
    }

    void keep_at_least(float low) {  // in id order; what is below is forgotten
        const bool listed = !ids.empty();
        int64_t kept = 0;
        if (!listed) ids.resize(n);
        for (int64_t start = 0; start < n; start += BLOCK) {
            const int64_t end = std::min(n, start + BLOCK);
            if (largest_in(&values[start], end - start) < low) continue;
            for (int64_t i = start; i < end; ++i) {
                const float v = values[i];
                values[kept] = v;
                ids[kept] = listed ? ids[i] : int32_t(i);
                kept += v >= low;
            }
        }
        for (n = kept; n % VL; ++n) values[n] = -INF;
    }

    void keep_top(int64_t k, float top) {  // and all that equal the k-th
        std::vector<float> maxima;
        for (int64_t start = 0; start < n; start += BLOCK)
            maxima.push_back(largest_in(&values[start], std::min<int64_t>(BLOCK, n - start)));
        // The k-th largest maximum of a block cannot be above the k-th largest value: mostly few values are left.
        if (k <= int64_t(maxima.size())) {
            while (maxima.size() % VL) maxima.push_back(-INF);
            keep_at_least(threshold<Measure::COUNT>(maxima.data(), maxima.size(), double(k), -INF, top, scratch));
        }
        keep_at_least(threshold<Measure::COUNT>(values.data(), n, double(k), -INF, top, scratch));
    }

    void weigh(float top, float temperature) {
        for (int64_t i = 0; i < n; i += VL) store(&values[i], exp((load<vf>(&values[i]) - top) / temperature));
    }

    void drop_below(float low) {
        for (int64_t i = 0; i < n; i += VL) {
            vf w = load<vf>(&values[i]);
            store(&values[i], w >= low ? w : vf{});
        }
    }

    void keep_mass(double p) {
        const double wanted = p * measure<Measure::SUM>(values.data(), n, 0);
        for (float cut : {0x1p-3f, 0x1p-7f, 0x1p-12f})  // mostly few tokens hold the mass
            if (measure<Measure::SUM>(values.data(), n, cut) >= wanted) {
                keep_at_least(cut);
                break;
            }
        const float low = threshold<Measure::SUM>(values.data(), n, wanted, 0, 1, scratch);
        drop_below(low);
        double mass = measure<Measure::SUM>(values.data(), n, of_rank(rank_of(low) + 1));
        const double equal = measure<Measure::COUNT>(values.data(), n, low) -
                             measure<Measure::COUNT>(values.data(), n, of_rank(rank_of(low) + 1));
        if (low == 0 || equal < 2) return;
        for (int64_t i = 0; i < n; ++i) {  // of equal weights, the lower ids until it is enough
            if (values[i] != low) continue;
            if (mass >= wanted && mass > 0) values[i] = 0;  // one token stays, even where p is 0 as a float
            mass += low;
        }
    }

    int32_t draw(double u) const {
        std::vector<double> sums;
        double total = 0;
        for (int64_t start = 0; start < n; start += CHUNK) {
            sums.push_back(measure<Measure::SUM>(&values[start], std::min<int64_t>(CHUNK, n - start), 0));
            total += sums.back();
        }
        const double target = u * total;
        double cdf = 0;
        size_t chunk = 0;
        while (chunk + 1 < sums.size() && cdf + sums[chunk] <= target) cdf += sums[chunk++];
        int64_t chosen = chunk * CHUNK;
        for (int64_t i = chosen; i < n && cdf <= target; ++i)
            if (values[i] > 0) cdf += values[chosen = i];
        while (chosen > 0 && !(values[chosen] > 0)) --chosen;  // rounding put the target behind the last weight
        return ids.empty() ? int32_t(chosen) : ids[chosen];
    }

    template <class T>
    int32_t choose(const T* logits, int64_t vocabulary, const Sampling& how, int64_t row) {
        const float temperature = how.temperature[row], penalty = how.repetition_penalty[row];
        if (temperature == 0 && penalty == 1) return argmax(logits, vocabulary);
        read(logits, vocabulary);
        if (penalty != 1)
            penalise(logits, vocabulary, how.history + how.history_rows[row] * how.history_stride,
                     how.history_lens[row], penalty);
        const float top = largest_in(values.data(), n);
        if (temperature == 0 || top == INF || top == -INF) return argmax(values.data(), n);
        const int64_t k = how.top_k[row];
        if (k > 0 && k < vocabulary) keep_top(k, top);
        weigh(top, temperature);
        if (how.top_p[row] < 1) keep_mass(how.top_p[row]);
        if (how.min_p[row] > 0) drop_below(how.min_p[row]);
        return draw(uniform(how.seed[row], how.index[row], how.position[row]));
    }
};

template <class T>
void sample(const T* logits, int64_t stride, int64_t rows, int64_t vocabulary, const Sampling& how, int32_t* tokens,
            int threads) {
#pragma omp parallel num_threads(threads) if (rows > 1)
    {
        static thread_local Row memory;
#pragma omp for schedule(dynamic, 1)
        for (int64_t row = 0; row < rows; ++row) {
            const T* x = logits + row * stride;
            tokens[row] = how.all_greedy ? argmax(x, vocabulary) : memory.choose(x, vocabulary, how, row);
        }
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                       \
    EXPORTED void sample_##suffix(const T* logits, int64_t stride, int64_t rows, int64_t vocabulary,            \
                                  const Sampling* how, int32_t* tokens, int threads) {                          \
        sample(logits, stride, rows, vocabulary, *how, tokens, threads);                                        \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
