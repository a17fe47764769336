// How many threads run a list of ops while other programs use some of the cores.
//
// All threads meet after each op, so one whose core is shared with another program holds up the others for whole time
// slices, and two threads take longer than one would. The team then leaves out a thread, so that the operating system
// can give each of the others a core of its own, and now and then tries again with all of them. Results do not depend
// on the number of threads.
#pragma once

#include <ctime>

namespace octavo {

// CPU time of the calling thread.
inline double cpu_seconds() {
#if defined(__linux__)
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
#else
    return 0.0;
#endif
}

class TeamSize {
public:
    // Threads of the next call, at most `most`.
    int next(int most) {
        if (rest_ == 0 || most == 1) return most;
        --rest_;
        return most - 1;
    }

    // What a call by all threads showed. `wall`: its seconds; `stolen`: the most that a thread was kept from its core;
    // `asleep`: the most that a thread slept until others had arrived.
    void saw(double wall, double stolen, double asleep) {
        if (wall < kShortest) return;
        const double share = (stolen < asleep ? stolen : asleep) / wall;
        held_up_ += kWeight * (share - held_up_);
        if (held_up_ > kTooMuch) rest_ = kRest;
    }

private:
    static constexpr double kShortest = 5e-4;  // shorter calls tell nothing about time slices
    static constexpr double kWeight = 0.3;
    static constexpr double kTooMuch = 0.25;
    static constexpr int kRest = 32;  // calls

    double held_up_ = 0.0;  // share of the time of recent calls
    int rest_ = 0;
};

}  // namespace octavo
