// The threads that run a list of ops together.
#pragma once

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

// State that all threads share.
struct Shared {
    // A waiting thread sleeps after this many spins, about 30 us: threads that share their cores with other programs
    // would otherwise burn their time slices waiting for each other, and a step would take five times as long.
    static constexpr int kSpins = 2000;

    alignas(kCacheLine) std::atomic<int> arrived{0};
    alignas(kCacheLine) std::atomic<int> generation{0};
    std::atomic<int> sleepers{0};
    alignas(kCacheLine) std::atomic<int> ticket{0};
    char* workspace = nullptr;

    // Barrier: returns when all threads have arrived. Their earlier writes are then visible, and tickets restart at 0.
    // Adds to `asleep` the seconds that the thread slept.
    void wait(int size, double& asleep) {
        const int before = generation.load(std::memory_order_relaxed);
        if (size == 1 || arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            ticket.store(0, std::memory_order_relaxed);
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

private:
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

struct Range {
    int begin;
    int end;
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

    void wait() const { shared.wait(size, asleep); }
    Range share(int n) const { return octavo::share(n, index, size); }
    // 0, 1, 2 ... across all threads, since the last wait.
    int ticket() const { return shared.ticket.fetch_add(1, std::memory_order_relaxed); }
};

}  // namespace octavo
