// The emulated multiprocessor: runs the threads of a block as fibers on one OS thread, and blocks over OS threads.
//
// A fiber runs until it must wait for others: at a warp collective (shuffle, ldmatrix, mma), a block barrier, or its
// end. Which fiber runs next is the schedule, a setting: a kernel must give the same result under each.
//   order       seed 0: ascending thread index; 1: descending; above: shuffled anew in every pass
//   warps       pass: every warp advances in turn; greedy: a warp runs on until it waits for another warp
//   async copy  eager: cp.async and TMA copy at once (shows a buffer refilled too early);
//               lazy: only at the wait that promises it (shows a missing wait)
// Shared memory starts as 0xFF, a NaN in every float type. Errors (diverged warp, misaligned copy, deadlock, ...) end
// the launch with std::runtime_error that names block and thread. Not seen here: faults in the device's asm bodies,
// order between blocks, rounding of ex2, and time.
#pragma once
#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fibers.h"

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

struct Schedule {
    unsigned seed = 0;
    bool greedy = false;
    bool lazy_copies = true;
    int os_threads = 2;
};
inline Schedule schedule;

// What a launch did; reset by the tests. `bank_conflicts` counts 16-byte rows of one ldmatrix phase that share a bank.
struct Counters {
    std::atomic<long> launches, matrix_products, matrix_loads, bank_conflicts, async_copies, bulk_copies, prefetches,
        barriers;
};
inline Counters counters;

inline void count(std::atomic<long> &counter, long n = 1) { counter.fetch_add(n, std::memory_order_relaxed); }

struct AsyncCopy {
    void *to;
    const void *from;
    unsigned bytes;
    bool valid;  // false: fill with zeros
    void run() const { valid ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes); }
};

// Where threads meet. `generation` moves on when the last one has arrived.
struct Gate {
    uint32_t generation = 0;
    uint32_t arrived = 0;  // lanes of a warp, as bits
    uint32_t mask = 0;
    int count = 0, expected = 0;  // threads of a block
    const char *operation = nullptr;
    const void *in[32];
    void *out[32];
};

struct Thread {
    Fiber fiber;
    dim3 index;
    int lane = 0, warp = 0;
    bool done = false;
    const uint32_t *waits_on = nullptr;  // runnable once this generation differs from the one seen
    uint32_t seen = 0;
    const char *where = "";
    std::vector<AsyncCopy> open_group;
    std::vector<std::vector<AsyncCopy>> groups;
    bool runnable() const { return !done && !(waits_on && *waits_on == seen); }
};

struct Hopper;  // mbarriers, bulk copies and warpgroups: hopper.h

struct Block {
    dim3 index, threads_shape, grid_shape;
    int live = 0;
    std::vector<Thread> threads;
    std::vector<Gate> warps;
    Gate barriers[16];  // 0 is that of __syncthreads
    char *shared = nullptr;
    size_t shared_bytes = 0;
    HomeStack home;
    const std::function<void()> *kernel = nullptr;
    std::string error;
    int giving_way = 0;  // threads
    uint32_t standstills = 0;
    std::shared_ptr<Hopper> hopper;  // made when first used
};

inline thread_local Block *block = nullptr;
inline thread_local Thread *self = nullptr;

[[noreturn]] inline void fail(const std::string &message) {
    block->error = message + " (block " + std::to_string(block->index.x) + "," + std::to_string(block->index.y) +
                   ", thread " + std::to_string(self->index.x) + ")";
    self->fiber.leave(block->home, false);
    std::abort();
}

inline void wait_for(const uint32_t &generation, uint32_t seen, const char *where) {
    {
        Bookkeeping own;
        self->waits_on = &generation, self->seen = seen, self->where = where;
    }
    self->fiber.leave(block->home, false);
}

// Until no thread can go on that does not give way.
inline void give_way(const char *where) {
    {
        Bookkeeping own;
        block->giving_way++;
    }
    wait_for(block->standstills, block->standstills, where);
}

// Every lane of `mask` brings `in` and `out`; the last to arrive runs combine(in[32], out[32]) for all. Orders no
// memory.
template <class In, class Out, class Combine>
void collective(unsigned mask, const char *operation, const In &in, Out &out, Combine &&combine) {
    Gate &gate = block->warps[self->warp];
    const int lane = self->lane;
    uint32_t generation;
    bool last;
    {
        Bookkeeping own;
        if (!(mask >> lane & 1)) fail(std::string(operation) + ": the calling lane is not in the mask");
        if (gate.arrived == 0) {
            gate.mask = mask, gate.operation = operation;
        } else if (gate.mask != mask || gate.operation != operation) {
            fail(std::string("warp diverged: ") + operation + " meets " + gate.operation);
        }
        gate.in[lane] = &in, gate.out[lane] = &out;
        gate.arrived |= 1u << lane;
        generation = gate.generation;
        last = gate.arrived == gate.mask;
        if (last) {
            combine(reinterpret_cast<const In *const *>(gate.in), reinterpret_cast<Out *const *>(gate.out));
            gate.arrived = 0;
            gate.generation++;
        }
    }
    if (!last) wait_for(gate.generation, generation, operation);
}

// One of the block's barriers. Stricter than the device: a thread that has ended does not count as arrived, and all
// name the same number of threads.
inline void barrier(int number, int threads, const char *operation) {
    Gate &gate = block->barriers[number];
    uint32_t generation;
    bool last;
    order_release(&gate);
    {
        Bookkeeping own;
        count(counters.barriers);
        if (gate.count == 0) gate.expected = threads;
        if (gate.expected != threads) fail(std::string(operation) + ": threads wait for different numbers");
        generation = gate.generation;
        last = ++gate.count == threads;
        if (last) gate.count = 0, gate.generation++;
    }
    if (!last) wait_for(gate.generation, generation, operation);
    order_acquire(&gate);
}

inline void async_copy(void *to, const void *from, unsigned bytes, bool valid) {
    count(counters.async_copies);
    if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes)) {
        fail("cp.async: misaligned address");
    }
    const AsyncCopy copy{to, from, bytes, valid};
    if (!schedule.lazy_copies) return copy.run();
    Bookkeeping own;
    self->open_group.push_back(copy);
}

inline void async_commit() {
    Bookkeeping own;
    self->groups.push_back(std::move(self->open_group));
    self->open_group.clear();
}

inline void async_wait(size_t groups_left) {
    while (self->groups.size() > groups_left) {
        for (const AsyncCopy &copy : self->groups.front()) copy.run();
        Bookkeeping own;
        self->groups.erase(self->groups.begin());
    }
}

inline void thread_main() {
    self->fiber.entered(block->home);
    order_acquire(block);
    (*block->kernel)();
    order_release(block);
    {
        Bookkeeping own;
        self->done = true;
        block->live--;
    }
    self->fiber.leave(block->home, true);
}

inline bool advance(Block &b, Thread &thread) {
    if (!thread.runnable()) return false;
    thread.waits_on = nullptr;
    self = &thread;
    thread.fiber.enter(b.home);
    return true;
}

inline std::string describe_deadlock(const Block &b) {
    std::string text = "deadlock:";
    for (const Thread &thread : b.threads) {
        if (thread.done || text.size() > 200) continue;
        text += " thread " + std::to_string(thread.index.x) + " waits at " + thread.where + ";";
    }
    return text;
}

// One pass over the block's threads in the schedule's order; says whether anything advanced.
inline bool run_pass(Block &b, std::mt19937 &random) {
    const int threads = static_cast<int>(b.threads.size()), warps = static_cast<int>(b.warps.size());
    std::vector<int> order(threads), warp_order(warps);
    for (int i = 0; i < threads; i++) order[i] = schedule.seed == 1 ? threads - 1 - i : i;
    for (int i = 0; i < warps; i++) warp_order[i] = schedule.seed == 1 ? warps - 1 - i : i;
    if (schedule.seed > 1) {
        std::shuffle(order.begin(), order.end(), random);
        std::shuffle(warp_order.begin(), warp_order.end(), random);
    }
    bool advanced = false;
    if (!schedule.greedy) {
        for (int i : order) {
            advanced |= advance(b, b.threads[i]);
            if (!b.error.empty()) return false;
        }
        return advanced;
    }
    for (int warp : warp_order) {
        for (bool more = true; more;) {
            more = false;
            for (int lane = 0; lane < 32 && warp * 32 + lane < threads; lane++) {
                const int at = schedule.seed == 1 ? 31 - lane : lane;
                if (warp * 32 + at < threads) more |= advance(b, b.threads[warp * 32 + at]);
                if (!b.error.empty()) return false;
            }
            advanced |= more;
        }
    }
    return advanced;
}

inline void run_block(Block &b) {
    const int threads = b.threads_shape.x * b.threads_shape.y * b.threads_shape.z;
    void *memory = nullptr;
    if (posix_memalign(&memory, 1024, std::max<size_t>(b.shared_bytes, 1))) throw std::bad_alloc();
    b.shared = static_cast<char *>(memory);
    std::memset(b.shared, 0xFF, b.shared_bytes);
    b.threads = std::vector<Thread>(threads);
    b.warps = std::vector<Gate>((threads + 31) / 32);
    b.live = threads;
    {
        Bookkeeping own;
        block = &b;
    }
    EMU_TSAN(b.home.tsan = __tsan_get_current_fiber();)
    order_release(&b);
    for (int i = 0; i < threads; i++) {
        Thread &thread = b.threads[i];
        thread.index = dim3(i % b.threads_shape.x, i / b.threads_shape.x % b.threads_shape.y,
                            i / (b.threads_shape.x * b.threads_shape.y));
        thread.lane = i % 32, thread.warp = i / 32;
        thread.fiber.start_at(&thread_main);
    }
    {
        Bookkeeping own;
        std::mt19937 random(schedule.seed + 977 * b.index.x + b.index.y);
        while (b.live > 0 && b.error.empty()) {
            if (run_pass(b, random) || !b.error.empty()) continue;
            if (b.giving_way == 0) b.error = describe_deadlock(b);
            b.giving_way = 0, b.standstills++;
        }
    }
    order_acquire(&b);
    for (Thread &thread : b.threads) thread.fiber.destroy();
    std::free(b.shared);
    Bookkeeping own;
    block = nullptr, self = nullptr;
}

inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()> &kernel) {
    count(counters.launches);
    const long blocks = static_cast<long>(grid.x) * grid.y * grid.z;
    std::atomic<long> next{0};
    std::mutex mutex;
    std::string error;
    auto work = [&] {
        for (long i = next++; i < blocks; i = next++) {
            Block b;
            b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (static_cast<long>(grid.x) * grid.y));
            b.threads_shape = threads, b.grid_shape = grid, b.shared_bytes = shared_bytes, b.kernel = &kernel;
            run_block(b);
            if (b.error.empty()) continue;
            std::lock_guard<std::mutex> lock(mutex);
            if (error.empty()) error = b.error;
            next = blocks;
        }
    };
    std::vector<std::thread> helpers;
    for (long i = 1; i < std::min<long>(schedule.os_threads, blocks); i++) helpers.emplace_back(work);
    work();
    for (std::thread &helper : helpers) helper.join();
    if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace emu
