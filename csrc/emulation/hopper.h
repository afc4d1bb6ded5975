// Hopper's asynchronous units: mbarriers, bulk tensor copies (TMA) and warpgroup matrix products.
//
// A product runs when a thread waits for its group, and not before all others wait too. A bulk copy lands at once, or,
// with lazy copies, when a thread waits on its mbarrier and cannot go on without it. Accumulators, and A operands in
// registers, are read and written through pointers to the threads' arrays, which must therefore outlive the product, as
// registers do.
//
// Stricter than the device: a thread fences before the first product after each wait; a phase of an mbarrier gets
// exactly the bytes that were expected for it, and is told of them before the copy starts. Not seen: an mbarrier made
// for fewer arrivals than it gets, a missing proxy fence, registers beyond setmaxnreg.
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

struct Hopper {
    std::map<ptrdiff_t, Mbarrier> mbarriers;
    std::vector<Warpgroup> warpgroups;
};

inline Hopper &hopper() {
    if (!block->hopper) {
        block->hopper = std::make_shared<Hopper>();
        block->hopper->warpgroups.resize((block->threads.size() + 127) / 128);
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

inline void run(const BulkCopy &copy, Mbarrier &barrier) {
    for (int r = 0; r < copy.map.box_rows; r++) {
        for (int c = 0; c < kBoxColumns; c += 8) {
            ptrdiff_t to = shared_offset(copy.to + r * kBoxRowBytes + 2 * c);
            if (copy.map.swizzled) to = swizzle_128(to);
            const int64_t row = int64_t(copy.row) + r, column = copy.column + c;
            const bool inside = row < copy.map.count && column < copy.map.columns;
            if (inside) std::memcpy(block->shared + to, copy.map.rows + row * copy.map.columns + column, 16);
            else std::memset(block->shared + to, 0, 16);
        }
    }
    barrier.bytes -= copy.map.box_rows * kBoxRowBytes;
    if (barrier.bytes < 0) fail("mbarrier: more bytes than expected");
    complete_if_due(barrier);
}

inline void bulk_copy(void *to, const TensorMap &map, int column, int row, const void *pointer) {
    Bookkeeping own;
    count(counters.bulk_copies);
    if (shared_offset(to) % 1024) fail("TMA: the swizzle wants a destination at a multiple of 1024 bytes");
    Mbarrier &barrier = mbarrier_at(pointer);
    const BulkCopy copy{map, static_cast<char *>(to), column, row};
    if (!schedule.lazy_copies) return run(copy, barrier);
    barrier.copies.push_back(copy);
    barrier.events++;
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

// Elements (mn, k) of an operand with 16 along k into values[mn][16]; counts conflicts of the 8 rows of 16 bytes that
// one access takes.
inline void read_operand(const Product &p, uint64_t descriptor, int mn_count, bool mn_contiguous, float *values) {
    for (int mn = 0; mn < mn_count; mn++) {
        for (int k = 0; k < 16; k++) {
            const ptrdiff_t at = operand_offset(descriptor, mn, k, mn_contiguous);
            if (at + 2 > ptrdiff_t(block->shared_bytes)) fail("wgmma: operand beyond shared memory");
            uint16_t bits;
            std::memcpy(&bits, block->shared + at, 2);
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
