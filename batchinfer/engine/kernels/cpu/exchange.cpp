// Words between processes: a counter in shared memory that one side raises and the other waits for.
#include <atomic>
#include <ctime>

#include "simd.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Counter = std::atomic<uint32_t>;

bool reached(const Counter* counter, uint32_t value) {  // counters wrap around
    return int32_t(counter->load(std::memory_order_acquire) - value) >= 0;
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

void sleep_while(Counter* counter, uint32_t value, double seconds) {
#if defined(__linux__)
    const uint32_t seen = counter->load(std::memory_order_acquire);
    if (int32_t(seen - value) >= 0) return;
    timespec t{time_t(seconds), long((seconds - double(time_t(seconds))) * 1e9)};
    syscall(SYS_futex, counter, FUTEX_WAIT, seen, &t, nullptr, 0);
#else
    (void)counter, (void)value;
    timespec t{0, long(std::min(seconds, 50e-6) * 1e9)};
    nanosleep(&t, nullptr);
#endif
}

}  // namespace

// Everything written before is seen by whoever sees the value.
EXPORTED void raise_to(Counter* counter, uint32_t value) {
    counter->store(value, std::memory_order_release);
#if defined(__linux__)
    syscall(SYS_futex, counter, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

// Whether the counter came to `value` within `seconds`. Spins for `spin` seconds: a sleeper takes longer to wake.
EXPORTED int wait_for(Counter* counter, uint32_t value, double spin, double seconds) {
    if (reached(counter, value)) return 1;
    const double begun = now();
    do {
        for (int i = 0; i < 64; ++i) {
            if (reached(counter, value)) return 1;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    } while (now() - begun < spin);
    for (double left; (left = begun + seconds - now()) > 0;) {
        sleep_while(counter, value, left);
        if (reached(counter, value)) return 1;
    }
    return 0;
}
