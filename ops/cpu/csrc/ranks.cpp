// Meetings of ranks.
#include "ranks.h"

#if defined(__linux__)
#include <ctime>
#endif

namespace octavo {

namespace {

// A sleeper looks this often whether a rank has left.
constexpr int64_t kLookNanoseconds = 100'000'000;

MeetingPlace& place_of(const OctavoRanks& ranks) { return *static_cast<MeetingPlace*>(ranks.place); }

bool has_come(const Attendance& rank, uint32_t meeting) {
    return static_cast<int32_t>(rank.meetings.load(std::memory_order_seq_cst) - meeting) >= 0;
}

#if defined(__linux__)
void sleep_while(const std::atomic<uint32_t>& word, uint32_t value) {
    const timespec timeout = {0, kLookNanoseconds};
    syscall(SYS_futex, &word, FUTEX_WAIT, value, &timeout, nullptr, 0);
}

void wake(const std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }
#else
void sleep_while(const std::atomic<uint32_t>&, uint32_t) { sched_yield(); }
void wake(const std::atomic<uint32_t>&) {}
#endif

// Sleeps until the rank comes. Either the sleeper sees that it has, or the rank sees the sleeper.
void await_asleep(MeetingPlace& place, const Attendance& rank, uint32_t meeting) {
    place.sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (!has_come(rank, meeting) && !place.is_broken.load(std::memory_order_seq_cst)) {
        const uint32_t seen = rank.meetings.load(std::memory_order_seq_cst);
        if (static_cast<int32_t>(seen - meeting) < 0) sleep_while(rank.meetings, seen);
    }
    place.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace

bool meet(const OctavoRanks& ranks, double& asleep) {
    MeetingPlace& place = place_of(ranks);
    Attendance& own = place.of(ranks.rank);
    const uint32_t meeting = own.meetings.load(std::memory_order_relaxed) + 1;
    own.meetings.store(meeting, std::memory_order_seq_cst);
    if (place.sleepers.load(std::memory_order_seq_cst)) wake(own.meetings);
    int spins = 0;
    for (int rank = 0; rank < ranks.size; ++rank) {
        const Attendance& other = place.of(rank);
        while (!has_come(other, meeting)) {
            if (place.is_broken.load(std::memory_order_relaxed)) return false;
            if (++spins <= Shared::kSpins) {
                relax();
                continue;
            }
            const double begin = seconds();
            await_asleep(place, other, meeting);
            asleep += seconds() - begin;
        }
    }
    return !place.is_broken.load(std::memory_order_acquire);
}

void leave(const OctavoRanks& ranks) {
    MeetingPlace& place = place_of(ranks);
    place.is_broken.store(1, std::memory_order_seq_cst);
    for (int rank = 0; rank < ranks.size; ++rank) wake(place.of(rank).meetings);
}

}  // namespace octavo

using namespace octavo;

int64_t octavo_meeting_bytes(int32_t size) {
    return static_cast<int64_t>(sizeof(MeetingPlace) + sizeof(Attendance) * static_cast<size_t>(size));
}

int32_t octavo_meet(const OctavoRanks* ranks) {
    double asleep = 0.0;
    return meet(*ranks, asleep) ? 0 : 1;
}

void octavo_leave(const OctavoRanks* ranks) { leave(*ranks); }
