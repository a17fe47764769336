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
    // Threads of the next call, at most `most`; `now` in seconds.
    int next(int most, double now) const { return most > 1 && now < rest_end_ ? most - 1 : most; }

    // What a call by all threads showed. `wall`: its seconds; `stolen`: those for which threads were kept from their
    // cores, of all threads together; `asleep`: those for which a thread slept until others had arrived, on average of
    // all but one, since one is always awaited. The first call after a rest decides alone.
    void saw(double now, double wall, double stolen, double asleep) {
        if (wall < kShortest) return;
        const double share = (stolen < asleep ? stolen : asleep) / wall;
        held_up_ += (rested_ ? 1.0 : kWeight) * (share - held_up_);
        rested_ = held_up_ > kTooMuch;
        if (rested_) rest_end_ = now + kRest;
    }

private:
    static constexpr double kShortest = 5e-4;  // shorter calls tell nothing about time slices
    static constexpr double kWeight = 0.3;
    static constexpr double kTooMuch = 0.2;
    static constexpr double kRest = 1.0;  // seconds

    double held_up_ = 0.0;  // share of the time of recent calls
    double rest_end_ = 0.0;
    bool rested_ = false;
};

}  // namespace octavo
