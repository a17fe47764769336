// Threads of a team that wake up on the same core.
//
// The operating system wakes a thread on the core of the one that wakes it if all others look busy at that moment, and
// may leave it there for milliseconds, in which both take turns: a short call then takes seven times as long as on a
// core each, though a core is free.
#pragma once

#include <atomic>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace octavo {

// Where the threads of a call began.
class Cores {
public:
    explicit Cores(int threads) : taken_(static_cast<size_t>(threads)) {
        for (auto& core : taken_) core.store(kNone, std::memory_order_relaxed);
    }

    // Each thread of the team calls this once, before its first op. If another one has begun on its core, it moves to
    // one on which none has, if it may use any. Returns its core; kNone: unknown.
    int take(int index) {
#if defined(__linux__)
        int core = sched_getcpu();
        cpu_set_t allowed;
        if (core >= 0 && core < CPU_SETSIZE && is_taken(core, index) &&
            sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
            cpu_set_t free = allowed;
            for (const auto& other : taken_) {
                const int place = other.load(std::memory_order_relaxed);
                if (place != kNone) CPU_CLR(place, &free);
            }
            if (CPU_COUNT(&free) > 0 && sched_setaffinity(0, sizeof free, &free) == 0) {  // returns on another core
                core = sched_getcpu();
                sched_setaffinity(0, sizeof allowed, &allowed);
            }
        }
        if (core >= 0 && core < CPU_SETSIZE) taken_[static_cast<size_t>(index)].store(core, std::memory_order_relaxed);
        return core;
#else
        return kNone;
#endif
    }

    static constexpr int kNone = -1;

private:
    bool is_taken(int core, int index) const {
        for (size_t i = 0; i < taken_.size(); ++i)
            if (static_cast<int>(i) != index && taken_[i].load(std::memory_order_relaxed) == core) return true;
        return false;
    }

    std::vector<std::atomic<int>> taken_;
};

}  // namespace octavo
