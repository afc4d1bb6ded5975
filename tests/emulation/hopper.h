// Hopper's asynchronous units: mbarriers, bulk tensor copies (TMA) and warpgroup matrix products.
//
// A product runs when a thread waits for its group, and not before all others wait too. A bulk copy lands at once, or,
// with lazy copies, when a thread waits on its mbarrier and cannot go on without it. Accumulators, and A operands in
// registers, are read and written through pointers to the threads' arrays, which must therefore outlive the product, as
// registers do.
//
// Stricter than the device: a thread fences before the first product after each wait; a phase of an mbarrier gets
// exactly the bytes that were expected for it, and is told of them before the copy starts. The asynchronous units have
// an image of shared memory of their own, which a thread's stores reach by store_for_products and its fence only; where
// a product finds that the two differ, it was not fenced or the place was not free.
// Not seen: an mbarrier made for fewer arrivals than it gets, a missing proxy fence between a thread's load and the
// copy that overwrites it, registers beyond setmaxnreg.
#pragma once
#include <map>

#include "cuda.h"

namespace emu {

// Rows [count, columns] of 16-bit elements, copied in boxes of box_rows x 64 elements.
struct TensorMap {
    const uint16_t *rows;
    int64_t count;
    int columns, box_rows;
    bool swizzled;  // in 128-byte rows
};
constexpr int kBoxColumns = 64, kBoxRowBytes = 2 * kBoxColumns;

struct BulkCopy {
    TensorMap map;
    char *to;
    int column, row;
    const char *from = nullptr;  // for a plain copy, without a map
    int bytes = 0;
};

struct Mbarrier {
    uint32_t phase = 0;   // how many have completed
    uint32_t events = 0;  // moves on when a waiting thread should look again
    int arrivals = 0, pending = 0;
    long bytes = 0;  // still to come in this phase
    std::vector<BulkCopy> copies;
};

// d [64, n] (+)= a [64, 16] b [16, n], as the 128 threads of a warpgroup hold them.
struct Product {
    float *d[128];
    const uint32_t *a_registers[128];
    bool a_in_registers, accumulate, b_transposed;
    uint64_t a, b;  // descriptors
    int n;
    float (*to_float)(uint16_t);
};

struct Warpgroup {
    uint32_t generation = 0;
    int arrived = 0;
    const char *operation = nullptr;
    Product meeting;
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
    size_t done = 0;
    size_t committed[128] = {};
    bool fenced[128] = {};
};

struct Stored {
    ptrdiff_t at;
    size_t bytes;
};

struct Hopper {
    std::map<ptrdiff_t, Mbarrier> mbarriers;
    std::vector<Warpgroup> warpgroups;
    std::vector<char> async_view;               // shared memory as the asynchronous units see it
    std::vector<std::vector<Stored>> unfenced;  // by thread: stores that they do not see yet
};

inline Hopper &hopper() {
    if (!block->hopper) {
        block->hopper = std::make_shared<Hopper>();
        block->hopper->warpgroups.resize((block->threads.size() + 127) / 128);
        block->hopper->async_view.assign(block->shared_bytes, char(0xFF));
        block->hopper->unfenced.resize(block->threads.size());
    }
    return *block->hopper;
}

inline ptrdiff_t shared_offset(const void *pointer) {
    const ptrdiff_t offset = static_cast<const char *>(pointer) - block->shared;
    if (offset < 0 || offset >= ptrdiff_t(block->shared_bytes)) fail("not an address in shared memory");
    return offset;
}

// The 128-byte swizzle: the place of a 16-byte chunk within its row of 128 bytes is xor-ed with the row modulo 8.
inline ptrdiff_t swizzle_128(ptrdiff_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

template <class T>
void store_for_products(T *to, T value) {
    *to = value;
    Bookkeeping own;
    hopper().unfenced[self->index.x].push_back({shared_offset(to), sizeof(T)});
}

inline void async_proxy_fence() {
    std::vector<Stored> *stores;
    char *view;
    {
        Bookkeeping own;
        stores = &hopper().unfenced[self->index.x], view = hopper().async_view.data();
    }
    for (const Stored &store : *stores) {  // a write of this thread: a product of others before a barrier is a race
        std::memcpy(view + store.at, block->shared + store.at, store.bytes);
    }
    Bookkeeping own;
    stores->clear();
}

inline Mbarrier &mbarrier_at(const void *pointer) {
    auto found = hopper().mbarriers.find(shared_offset(pointer));
    if (found == hopper().mbarriers.end()) fail("mbarrier: not initialised");
    return found->second;
}

inline void mbarrier_init(const void *pointer, int arrivals) {
    Bookkeeping own;
    if (shared_offset(pointer) % 8) fail("mbarrier: misaligned");
    Mbarrier &barrier = hopper().mbarriers[shared_offset(pointer)];
    barrier.arrivals = barrier.pending = arrivals;
}

inline void complete_if_due(Mbarrier &barrier) {
    if (barrier.pending > 0 || barrier.bytes > 0) return;
    barrier.pending = barrier.arrivals;
    barrier.phase++, barrier.events++;
}

inline void mbarrier_arrive(const void *pointer, long expected_bytes) {
    Mbarrier *barrier;
    {
        Bookkeeping own;
        barrier = &mbarrier_at(pointer);
    }
    order_release(barrier);
    Bookkeeping own;
    barrier->bytes += expected_bytes;
    if (--barrier->pending < 0) fail("mbarrier: more arrivals than expected");
    complete_if_due(*barrier);
}

// What a copy brings is seen by threads and asynchronous units alike; nothing to copy from: zeros.
inline void land(ptrdiff_t to, const void *from, size_t bytes) {
    char *view = hopper().async_view.data() + to;
    if (from) std::memcpy(view, from, bytes);
    else std::memset(view, 0, bytes);
    std::memcpy(block->shared + to, view, bytes);
}

inline void run(const BulkCopy &copy, Mbarrier &barrier) {
    if (copy.from) land(shared_offset(copy.to), copy.from, copy.bytes);
    for (int r = 0; !copy.from && r < copy.map.box_rows; r++) {
        for (int c = 0; c < kBoxColumns; c += 8) {
            ptrdiff_t to = shared_offset(copy.to + r * kBoxRowBytes + 2 * c);
            if (copy.map.swizzled) to = swizzle_128(to);
            const int64_t row = int64_t(copy.row) + r, column = copy.column + c;
            const bool inside = row < copy.map.count && column < copy.map.columns;
            land(to, inside ? copy.map.rows + row * copy.map.columns + column : nullptr, 16);
        }
    }
    barrier.bytes -= copy.from ? copy.bytes : copy.map.box_rows * kBoxRowBytes;
    if (barrier.bytes < 0) fail("mbarrier: more bytes than expected");
    complete_if_due(barrier);
}

inline void start(const BulkCopy &copy, const void *pointer) {
    count(counters.bulk_copies);
    Mbarrier &barrier = mbarrier_at(pointer);
    if (!schedule.lazy_copies) return run(copy, barrier);
    barrier.copies.push_back(copy);
    barrier.events++;
}

inline void bulk_copy(void *to, const TensorMap &map, int column, int row, const void *pointer) {
    Bookkeeping own;
    if (shared_offset(to) % 1024) fail("TMA: the swizzle requires a destination at a multiple of 1024 bytes");
    start({map, static_cast<char *>(to), column, row}, pointer);
}

inline void bulk_copy(void *to, const void *from, int bytes, const void *pointer) {
    Bookkeeping own;
    if (shared_offset(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) {
        fail("bulk copy: addresses and size must be multiples of 16 bytes");
    }
    shared_offset(static_cast<char *>(to) + bytes - 1);
    start({{}, static_cast<char *>(to), 0, 0, static_cast<const char *>(from), bytes}, pointer);
}

// Moves nothing. Looks at both ends, so that AddressSanitizer sees a place that is not there; others may write to it.
inline void bulk_prefetch(const void *from, int bytes) {
    Bookkeeping own;
    count(counters.prefetches);
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes <= 0) {
        fail("bulk prefetch: address and size must be multiples of 16 bytes");
    }
    const volatile char *bytes_there = static_cast<const char *>(from);
    (void)bytes_there[0], (void)bytes_there[bytes - 1];
}

// Until the phase of this parity has completed.
inline void mbarrier_wait(const void *pointer, unsigned parity) {
    Mbarrier *barrier;
    while (true) {
        uint32_t events;
        {
            Bookkeeping own;
            barrier = &mbarrier_at(pointer);
            if ((barrier->phase & 1) != parity) break;
            std::vector<BulkCopy> copies = std::move(barrier->copies);
            barrier->copies.clear();
            for (const BulkCopy &copy : copies) run(copy, *barrier);
            if ((barrier->phase & 1) != parity) break;
            events = barrier->events;
        }
        wait_for(barrier->events, events, "mbarrier wait");
    }
    order_acquire(barrier);
}

// A row of descriptor `d` is a row of the operand along which 128 bytes lie contiguous: of index mn if k runs along it,
// of index k if mn does. Returns the offset of element (mn, k).
inline ptrdiff_t operand_offset(uint64_t d, int mn, int k, bool mn_contiguous) {
    const ptrdiff_t base = ptrdiff_t(d & 0x3FFF) << 4, leading = ptrdiff_t(d >> 16 & 0x3FFF) << 4;
    const ptrdiff_t stride = ptrdiff_t(d >> 32 & 0x3FFF) << 4;
    if (d >> 62 != 1 || (d >> 49 & 7) != 0) fail("wgmma: only the 128-byte swizzle with base offset 0 is emulated");
    const ptrdiff_t offset = mn_contiguous ? base + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                           : base + mn / 8 * stride + mn % 8 * 128 + k * 2;
    return swizzle_128(offset);
}

// What this thread's product will read, for ThreadSanitizer: every row of both operands.
inline void touch_operands(const Product &p) {
    (void)p;
    EMU_TSAN({
        const volatile char *view;
        {
            Bookkeeping own;
            view = hopper().async_view.data();
        }
        auto touch = [&](uint64_t descriptor, int mn, int k, bool mn_contiguous) {
            const ptrdiff_t at = operand_offset(descriptor, mn, k, mn_contiguous);
            if (at >= ptrdiff_t(block->shared_bytes)) return;
            (void)view[at];
            (void)static_cast<const volatile char *>(block->shared)[at];
        };
        for (int mn = 0; mn < 64 && !p.a_in_registers; mn++) touch(p.a, mn, 0, false);
        for (int mn = 0; mn < p.n && !p.b_transposed; mn++) touch(p.b, mn, 0, false);
        for (int k = 0; k < 16 && p.b_transposed; k++) touch(p.b, 0, k, true);
    })
}

// Elements (mn, k) of an operand with 16 along k into values[mn][16]; counts conflicts of the 8 rows of 16 bytes that
// one access takes.
inline void read_operand(const Product &p, uint64_t descriptor, int mn_count, bool mn_contiguous, float *values) {
    for (int mn = 0; mn < mn_count; mn++) {
        for (int k = 0; k < 16; k++) {
            const ptrdiff_t at = operand_offset(descriptor, mn, k, mn_contiguous);
            if (at + 2 > ptrdiff_t(block->shared_bytes)) fail("wgmma: operand beyond shared memory");
            uint16_t bits;
            std::memcpy(&bits, hopper().async_view.data() + at, 2);
            if (std::memcmp(&bits, block->shared + at, 2)) fail("wgmma: a thread has stored to an operand, unfenced");
            values[16 * mn + k] = p.to_float(bits);
            if (mn % 8 || k % 8) continue;
            unsigned banks = 0;
            for (int i = 0; i < 8; i++) {
                const int row_mn = mn_contiguous ? mn : mn + i, row_k = mn_contiguous ? k + i : k;
                const unsigned bank = 1u << (operand_offset(descriptor, row_mn, row_k, mn_contiguous) / 16 % 8);
                if (banks & bank) count(counters.bank_conflicts);
                banks |= bank;
            }
        }
    }
}

inline void run(const Product &p) {
    std::vector<float> a_values(64 * 16), b_values(p.n * 16);
    float *a = a_values.data(), *b = b_values.data();
    if (p.a_in_registers) {
        for (int thread = 0; thread < 128; thread++) {
            const int row = thread / 32 * 16 + thread % 32 / 4, pair = 2 * (thread % 4);
            for (int r = 0; r < 4; r++) {
                float *at = a + 16 * (row + 8 * (r & 1)) + pair + 8 * (r >> 1);
                at[0] = p.to_float(p.a_registers[thread][r] & 0xFFFF);
                at[1] = p.to_float(p.a_registers[thread][r] >> 16);
            }
        }
    } else {
        read_operand(p, p.a, 64, false, a);
    }
    read_operand(p, p.b, p.n, p.b_transposed, b);
    for (int thread = 0; thread < 128; thread++) {
        for (int i = 0; i < p.n / 2; i++) {
            const int m = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + thread % 4 * 2 + i % 2;
            float sum = p.accumulate ? p.d[thread][i] : 0.f;
            for (int k = 0; k < 16; k++) sum += a[16 * m + k] * b[16 * n + k];
            p.d[thread][i] = sum;
        }
    }
}

// All 128 threads of a warpgroup bring their registers; the last starts the product.
inline void warpgroup_product(const char *operation, float *d, const uint32_t *a_registers, const Product &shape) {
    const int at = self->index.x % 128;
    Warpgroup *group;
    uint32_t generation;
    bool last;
    touch_operands(shape);
    {
        Bookkeeping own;
        group = &hopper().warpgroups[self->index.x / 128];
        if (!group->fenced[at]) fail("wgmma without wgmma.fence after the last wait");
        if (group->arrived == 0) {
            group->meeting = shape, group->operation = operation;
        } else if (group->operation != operation || group->meeting.a != shape.a || group->meeting.b != shape.b) {
            fail(std::string("warpgroup diverged: ") + operation + " meets " + group->operation);
        }
        group->meeting.d[at] = d, group->meeting.a_registers[at] = a_registers;
        generation = group->generation;
        last = ++group->arrived == 128;
        if (last) {
            count(counters.matrix_products);
            group->open.push_back(group->meeting);
            group->arrived = 0;
            group->generation++;
        }
    }
    if (!last) wait_for(group->generation, generation, operation);
}

inline void warpgroup_fence() {
    Bookkeeping own;
    hopper().warpgroups[self->index.x / 128].fenced[self->index.x % 128] = true;
}

// Every thread commits for itself; the first of them closes the group.
inline void warpgroup_commit() {
    Bookkeeping own;
    Warpgroup &group = hopper().warpgroups[self->index.x / 128];
    if (++group.committed[self->index.x % 128] <= group.groups.size()) return;
    group.groups.push_back(std::move(group.open));
    group.open.clear();
}

inline void warpgroup_wait(size_t groups_left) {
    give_way("wgmma.wait_group");
    Bookkeeping own;
    Warpgroup &group = hopper().warpgroups[self->index.x / 128];
    group.fenced[self->index.x % 128] = false;
    for (; group.done + groups_left < group.committed[self->index.x % 128]; group.done++) {
        for (const Product &product : group.groups[group.done]) run(product);
        group.groups[group.done].clear();
    }
}

}  // namespace emu
