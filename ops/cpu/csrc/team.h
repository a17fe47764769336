// The threads that run a list of ops together.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

namespace octavo {

constexpr size_t kCacheLine = 64;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Range {
    int begin;
    int end;
};

// Which items of a thread's share have been taken: some from its beginning, some from its end.
class alignas(kCacheLine) Taken {
public:
    // The next of `count` items: up to `most`, but at most one of `parts` equal parts of those that are left, since
    // others take over single ones at the end. None if all are taken.
    Range from_begin(int count, int most, int parts) {
        uint64_t before = most > 1 ? ends_.load(std::memory_order_relaxed) : 0;
        const int wanted = std::clamp((count - begin(before) - end(before)) / parts, 1, most);
        before = ends_.fetch_add(wanted, std::memory_order_relaxed);
        return {begin(before), std::min(begin(before) + wanted, count - end(before))};
    }
    // The index of the last one, or -1.
    int from_end(int count) {
        const uint64_t before = ends_.fetch_add(kOneFromEnd, std::memory_order_relaxed);
        return begin(before) + end(before) < count ? count - 1 - end(before) : -1;
    }
    void restart() { ends_.store(0, std::memory_order_relaxed); }

private:
    static constexpr uint64_t kOneFromEnd = uint64_t{1} << 32;
    static int begin(uint64_t ends) { return static_cast<int>(ends % kOneFromEnd); }
    static int end(uint64_t ends) { return static_cast<int>(ends / kOneFromEnd); }

    std::atomic<uint64_t> ends_{0};  // how many from the beginning, and in the upper half from the end
};

// State that all threads share.
struct Shared {
    // A waiting thread sleeps after this many spins, about 30 us: threads that share their cores with other programs
    // would otherwise burn their time slices waiting for each other, and a step would take five times as long.
    static constexpr int kSpins = 2000;

    alignas(kCacheLine) std::atomic<int> arrived{0};
    alignas(kCacheLine) std::atomic<int> generation{0};
    std::atomic<int> sleepers{0};
    alignas(kCacheLine) char* workspace = nullptr;
    Taken* taken = nullptr;  // [threads][2]: of the shares between two barriers, in turn

    // Barrier: returns when all threads have arrived. Their earlier writes are then visible, and shares start anew.
    // Adds to `asleep` the seconds that the thread slept.
    void wait(int index, int size, double& asleep) {
        wait(index, size, asleep, [] {});
    }

    // The same; the thread that arrives last calls `last` before any returns.
    template <class F>
    void wait(int index, int size, double& asleep, F last) {
        const int before = generation.load(std::memory_order_relaxed);
        shares_of(index, before + 1).restart();  // nobody has used it since the last barrier
        if (size == 1 || arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            last();
            arrived.store(0, std::memory_order_relaxed);
            // Sequentially consistent on both sides: either a sleeper sees the new generation, or we see the sleeper.
            generation.store(before + 1, std::memory_order_seq_cst);
            if (sleepers.load(std::memory_order_seq_cst)) wake();
            return;
        }
        for (int i = 0; i < kSpins; ++i) {
            if (generation.load(std::memory_order_acquire) != before) return;
            relax();
        }
        const double begin = seconds();
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        while (generation.load(std::memory_order_seq_cst) == before) sleep_while(before);
        sleepers.fetch_sub(1, std::memory_order_relaxed);
        asleep += seconds() - begin;
    }

    Taken& share_of(int index) { return shares_of(index, generation.load(std::memory_order_relaxed)); }

private:
    Taken& shares_of(int index, int number) { return taken[2 * index + number % 2]; }

#if defined(__linux__)
    void sleep_while(int value) { syscall(SYS_futex, &generation, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, &generation, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
    void sleep_while(int) { sched_yield(); }
    void wake() {}
#endif
};

// A thread's memory for the duration of an op. It is reused from call to call.
class Scratch {
public:
    ~Scratch() { release(); }

    template <class T>
    T* take(size_t count) {
        const size_t bytes = (count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
        if (blocks_.empty() || used_ + bytes > size_) {
            size_ = bytes > 2 * size_ ? bytes : 2 * size_;
            if (size_ < kSmallest) size_ = kSmallest;
            blocks_.push_back(static_cast<char*>(std::aligned_alloc(kCacheLine, size_)));
            if (!blocks_.back()) throw std::bad_alloc();
            used_ = 0;
        }
        T* result = reinterpret_cast<T*>(blocks_.back() + used_);
        used_ += bytes;
        return result;
    }

    // What has been taken so far.
    struct Mark {
        size_t blocks;
        size_t used;
    };
    Mark mark() const { return {blocks_.size(), used_}; }
    // Releases what was taken since.
    void release(const Mark& mark) { used_ = blocks_.size() == mark.blocks ? mark.used : 0; }

    // Releases everything taken. Of several blocks the last, largest one is kept.
    void reset() {
        while (blocks_.size() > 1) {
            std::free(blocks_.front());
            blocks_.erase(blocks_.begin());
        }
        used_ = 0;
    }

private:
    static constexpr size_t kSmallest = 1 << 18;

    void release() {
        for (char* block : blocks_) std::free(block);
        blocks_.clear();
    }

    std::vector<char*> blocks_;
    size_t size_ = 0;
    size_t used_ = 0;
};

// An equal share of n items.
inline Range share(int n, int index, int size) {
    const int each = n / size, rest = n % size;
    const int begin = index * each + (index < rest ? index : rest);
    return {begin, begin + each + (index < rest ? 1 : 0)};
}

// One thread's view of the team.
struct Team {
    int index;
    int size;
    Shared& shared;
    Scratch& scratch;
    double& asleep;  // seconds, at barriers

    void wait() const { shared.wait(index, size, asleep); }
    Range share(int n) const { return octavo::share(n, index, size); }

    // Divides n items among `parts` threads that follow each other, of which this is one. Calls `function(item, end)`
    // for those of its own share in order, where the share ends before `end`, and then `function(item, item + 1)` for
    // what its neighbours have left, from the end of their shares: threads seldom run at the same speed. May be used
    // once between two waits; in addition any number of times with `only_own`, for the own share alone.
    template <class F>
    void each(int n, int parts, F function, bool only_own = false) const {
        const auto take = [&](const Range& items, int end) {
            for (int item = items.begin; item < items.end; ++item) function(item, end);
        };
        each_run(n, parts, 1, take, only_own);
    }

    // The same for up to `most` items at a time, fewer once less than `turns` times as many are left of the share:
    // calls `function(items, end)`.
    template <class F>
    void each_run(int n, int parts, int most, F function, bool only_own = false, int turns = 4) const {
        const int part = index % parts, first = index - part;
        const Range own = octavo::share(n, part, parts);
        if (only_own) return function(own, own.end);
        const int count = own.end - own.begin;
        Taken& taken = shared.share_of(index);
        while (true) {
            const Range items = taken.from_begin(count, most, turns);
            if (items.begin >= items.end) break;
            function(Range{own.begin + items.begin, own.begin + items.end}, own.end);
        }
        for (int neighbour = 1; neighbour < parts && neighbour <= kNeighbours; ++neighbour)
            help(n, parts, first, (part + neighbour) % parts, function);
    }

private:
    static constexpr int kNeighbours = 3;  // whose shares a thread looks into

    template <class F>
    void help(int n, int parts, int first, int part, F& function) const {
        const Range theirs = octavo::share(n, part, parts);
        const int count = theirs.end - theirs.begin;
        Taken& taken = shared.share_of(first + part);
        for (int i = taken.from_end(count); i >= 0; i = taken.from_end(count))
            function(Range{theirs.begin + i, theirs.begin + i + 1}, theirs.begin + i + 1);
    }
};

}  // namespace octavo
