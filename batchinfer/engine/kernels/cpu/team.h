// The threads that work on an operator together.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

constexpr int64_t ROWS_AT_ONCE = 4;  // of what is done row by row

struct Range {
    int64_t begin, end;
};

// What is left of each thread's share of the work at hand: one for a parallel region, made before it.
class Work {
  public:
    explicit Work(int threads) : left(threads) {}

  private:
    friend struct Team;
    struct alignas(64) Left {
        std::atomic<uint64_t> range{0};  // the round it is of in the highest 16 bits, begin and end in 24 each
    };
    std::vector<Left> left;
};

struct Team {
    Work& work;
    int thread = 0, threads = 1;
    uint64_t round = 0;  // how often work was dealt; the same in all threads

    static Team here(Work& work) {  // inside of a parallel region
#if defined(_OPENMP)
        return {work, omp_get_thread_num(), omp_get_num_threads()};
#else
        return {work};
#endif
    }

    // For all of them; what they wrote before can be read after.
    void wait() const {
#pragma omp barrier
    }

    // Deals n < 2^24 things: each thread does its own share from the front, and who is done goes on with what others
    // have not begun, from the back. So what a thread touches is mostly what it touched before, and a core that is
    // slower for a while holds nobody up. All threads call it, and wait() before they call it again.
    // `each(i, next)`: next is likely to come after i, or is -1.
    template <class Each>
    __attribute__((always_inline)) void deal(int64_t n, Each each) {  // what a loop keeps in registers, this does too
        round = (round + 1) & 0xffff;
        for (int i = 0; i < threads; ++i) {
            const int whose = (thread + i) % threads;
            const Range share = {n * whose / threads, n * (whose + 1) / threads};
            const int64_t step = i ? -1 : 1;
            for (int64_t at; (at = take(whose, share, i > 0)) >= 0;) {
                const int64_t next = at + step;
                each(at, next >= share.begin && next < share.end ? next : -1);
            }
        }
    }

    // The same by `grain` at once, `each(range)`: for what is too little to be taken one by one.
    template <class Each>
    __attribute__((always_inline)) void deal(int64_t n, int64_t grain, Each each) {
        deal((n + grain - 1) / grain, [&](int64_t i, int64_t) {
            each(Range{i * grain, i * grain + grain < n ? i * grain + grain : n});
        });
    }

  private:
    int64_t take(int whose, Range share, bool last) {
        std::atomic<uint64_t>& range = work.left[whose].range;
        uint64_t known = range.load(std::memory_order_relaxed);
        for (;;) {
            // Of an earlier round: nobody has taken anything yet, its owner included.
            Range now = known >> 48 == round ? Range{int64_t(known >> 24 & 0xffffff), int64_t(known & 0xffffff)} : share;
            if (now.begin >= now.end) return -1;
            const int64_t taken = last ? --now.end : now.begin++;
            const uint64_t rest = round << 48 | uint64_t(now.begin) << 24 | uint64_t(now.end);
            if (range.compare_exchange_weak(known, rest, std::memory_order_relaxed)) return taken;
        }
    }
};
