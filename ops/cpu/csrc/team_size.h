// How many threads run a list of ops while other programs use some of the cores.
//
// All threads meet after each op, so one whose core is shared with another program holds up the others for whole time
// slices, and two threads may take longer than one would. If that happens to several calls in a row, the team leaves
// out a thread for a moment, so that the operating system can give each of the others a core of its own. If calls take
// less time like that, it goes on so, and tries again with all of them, after times that double as long as they are
// still held up, and become shorter while they are not: programs that run for a moment now and then, as on any machine,
// must not cost a thread for long.
// Results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
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
    // Threads of the next call, at most `most`; `now` in seconds. `work` tells calls apart that take longer than
    // others.
    int next(int most, double now, uint64_t work) {
        if (work != work_) *this = TeamSize(work, held_up_, rest_, rest_end_, rested_);
        return most > 1 && now < rest_end_ ? most - 1 : most;
    }

    // What a call by all threads showed. `wall`: its seconds; `stolen`: those for which threads were kept from their
    // cores, of all threads together; `asleep`: those for which a thread slept until others had arrived, on average of
    // all but one, since one is always awaited. The first call after a rest decides alone.
    void saw(double now, double wall, double stolen, double asleep) {
        if (wall < kShortest) return;
        const bool is_calm = rest_ == kFirstRest;
        const double share = std::min(std::min(stolen, asleep) / wall, is_calm ? kMostOfOne : 1.0);
        held_up_ += (rested_ ? 1.0 : kWeight) * (share - held_up_);
        together_ += together_ > 0.0 ? kWeight * (std::min(wall, kSlower * together_) - together_) : wall;
        const bool is_known = apart_ > 0.0 && now < tried_ + kMemory;
        const bool rests = held_up_ > kTooMuch && (!is_known || apart_ < together_);
        if (rests) {
            if (is_known) rest_ = std::min(2.0 * rest_, kLongestRest);
            rest_end_ = now + rest_;
        } else if (share < kTooMuch) {
            rest_ = std::max(kCalming * rest_, kFirstRest);
        }
        rested_ = rests;
    }

    // What one by fewer threads did.
    void saw_rest(double now, double wall) {
        if (wall < kShortest) return;
        apart_ += (apart_ > 0.0 ? kWeight : 1.0) * (wall - apart_);
        tried_ = now;
    }

    TeamSize() = default;

private:
    static constexpr double kShortest = 5e-4;  // shorter calls tell nothing about time slices
    static constexpr double kWeight = 0.3;
    static constexpr double kTooMuch = 0.2;
    static constexpr double kMostOfOne = 0.5;   // with kWeight: one call is never too much, unless others were lately
    static constexpr double kSlower = 2.0;      // calls that take longer than that count as if they took so long
    static constexpr double kFirstRest = 0.05;  // seconds
    static constexpr double kLongestRest = 1.6;
    static constexpr double kCalming = 0.97;  // of rests, with each call that nothing holds up
    static constexpr double kMemory = 10.0;

    TeamSize(uint64_t work, double held_up, double rest, double rest_end, bool rested)
        : work_(work), held_up_(held_up), rest_(rest), rest_end_(rest_end), rested_(rested) {}

    uint64_t work_ = 0;
    double held_up_ = 0.0;      // share of the time of recent calls
    double rest_ = kFirstRest;  // seconds of the last rest; shorter again with time
    double rest_end_ = 0.0;
    bool rested_ = false;
    double together_ = 0.0;  // seconds of recent calls by all threads
    double apart_ = 0.0;     // by fewer
    double tried_ = 0.0;     // when that was
};

}  // namespace octavo
