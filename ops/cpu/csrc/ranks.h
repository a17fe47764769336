// Ranks that compute a program together, in processes that share memory.
#pragma once

#include "octavo.h"
#include "team.h"

namespace octavo {

// How many meetings a rank has come to. Only the rank writes it.
struct alignas(kCacheLine) Attendance {
    std::atomic<uint32_t> meetings{0};
};

// Where the ranks meet: memory that all of them map, zeroed at first.
struct MeetingPlace {
    alignas(kCacheLine) std::atomic<uint32_t> is_broken{0};  // a rank has left
    alignas(kCacheLine) std::atomic<uint32_t> sleepers{0};

    Attendance& of(int rank) { return reinterpret_cast<Attendance*>(this + 1)[rank]; }
};

// Comes to the next meeting and returns once all ranks have come: their earlier writes are then visible. False if a
// rank has left, for good. Adds to `asleep` the seconds that the caller slept. One thread of a rank at a time.
bool meet(const OctavoRanks& ranks, double& asleep);

// Ends all meetings.
void leave(const OctavoRanks& ranks);

// Waits for the threads of the team, and for all ranks.
inline void wait(const Team& team, const OctavoRanks& ranks) {
    team.shared.wait(team.index, team.size, team.asleep, [&] { meet(ranks, team.asleep); });
}

}  // namespace octavo
