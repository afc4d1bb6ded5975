// The tile loop's building blocks for wgmma with TMA (H100, H200).
//
// Both products run on the same two tiles, as on sm80: a resident tile, and streamed tiles that pass through a ring and
// serve as keys and as values. Three warpgroups: one thread of the first starts all copies; the other two compute.
//
//   scores      S [64 rows of a warpgroup, columns] = resident [rows, P] . streamed [columns, P]^T
//   accumulate  O [64 rows of a warpgroup, P]      += weights(S) . streamed [columns, P]
//
// A computing warpgroup owns 64 resident rows. At P = 512 its accumulator would need 256 registers, so the two share 64
// rows: both compute the scores, each accumulates half of the channels. Where there is one product only, the scores,
// each has rows of its own at every P.
//
// Ring       full[stage] completes when the stage's bytes have landed, empty[stage] when every computing warp has read
//            it. The producer waits for empty, the others for full, each with the parity of its own round.
#pragma once
#include "primitives_sm90.cuh"
#include "rows.cuh"

namespace caco::sm90 {

// Per thread, after setmaxnreg. They come out of what the block was launched with, and a warpgroup that asks for more
// than is left waits for ever: ptxas gives a kernel with these launch bounds a multiple of 8 of a multiprocessor's 65536.
constexpr int kProducerRegisters = 24, kComputeRegisters = 240;
constexpr int kComputeWarpgroups = 2, kWarpgroups = 1 + kComputeWarpgroups;
constexpr int kLaunchRegisters = 65536 / (kWarpgroups * kWarpgroupThreads) / 8 * 8;
static_assert(kProducerRegisters + kComputeWarpgroups * kComputeRegisters <= kWarpgroups * kLaunchRegisters);

template <class T_, int kPadded_, int kProducts = 2>
struct Tile {
    using T = T_;
    static constexpr int kPadded = kPadded_;
    static constexpr int kThreads = kWarpgroupThreads * kWarpgroups;
    static constexpr int kChannelGroups = kPadded == 512 && kProducts == 2 ? 2 : 1;  // warpgroups that share 64 rows
    static constexpr int kRows = 64 * kComputeWarpgroups / kChannelGroups;
    static constexpr int kColumns = kPadded == 512 ? 48 : kPadded == 256 ? 96 : 128;
    // Two products hold two stages at a time, the scores of a tile and the second product of the one before: the third
    // is filled meanwhile.
    static constexpr int kStages = kPadded == 512 ? 1 + kProducts : kPadded == 256 ? 3 : 4;
    static constexpr int kGroupChannels = kPadded / kChannelGroups;
    static constexpr int kSlabs = kPadded / kSlabChannels;
    static constexpr int kResidentSlabBytes = kRows * kSlabRowBytes, kStageSlabBytes = kColumns * kSlabRowBytes;
    static constexpr int kResidentBytes = kSlabs * kResidentSlabBytes, kStageBytes = kSlabs * kStageSlabBytes;
    static constexpr int kTileBytes = kResidentBytes + kStages * kStageBytes;
    static constexpr int kBarrierBytes = 128;  // what follows them is aligned for copies
    static constexpr int kSharedBytes = kTileBytes + kBarrierBytes;

    static_assert((1 + 2 * kStages) * int(sizeof(Mbarrier)) <= kBarrierBytes);
    static_assert(kStageSlabBytes % 1024 == 0 && kResidentSlabBytes % 1024 == 0, "the swizzle repeats every 8 rows");
    static_assert(kStages > kProducts, "a stage is filled while the products hold theirs");
    static_assert(kRows <= 256 && kColumns <= 256, "a TMA box has at most 256 rows");
    static_assert(kSharedBytes <= 227 * 1024, "sm_90 has 227 KB per block");

    using Scores = float[kColumns / 8][4];       // as wgmma lays out D [64, kColumns]
    using Weights = uint32_t[kColumns / 16][4];  // as A [64, 16] operands
    using Accumulator = float[kGroupChannels / 8][4];

    // Resident [slabs, kRows, 64], stages [kStages, slabs, kColumns, 64], barriers; what follows is the kernel's own.
    char *memory;
    int lane, warp, row_group, channel_group;  // of a computing warpgroup

    __device__ __forceinline__ explicit Tile(char *memory) : memory(memory) {
        // From lane 0, so that the compiler knows it to be the same in the whole warp.
        const int group = __shfl_sync(kFullWarp, int(threadIdx.x) / kWarpgroupThreads - 1, 0);
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32 % 4;
        row_group = group / kChannelGroups;
        channel_group = group % kChannelGroups;
    }

    __device__ __forceinline__ char *stage(int at) const { return memory + kResidentBytes + at * kStageBytes; }
    __device__ __forceinline__ Mbarrier *full(int at) const { return barriers() + at; }
    __device__ __forceinline__ Mbarrier *empty(int at) const { return barriers() + kStages + at; }
    __device__ __forceinline__ Mbarrier *resident_full() const { return barriers() + 2 * kStages; }

    // The resident rows of this thread's two halves of a fragment; column and channel of element e (0 or 1) of
    // fragment n.
    __device__ __forceinline__ int row(int half) const { return 64 * row_group + 16 * warp + lane / 4 + 8 * half; }
    __device__ __forceinline__ int column(int n, int e) const { return 8 * n + 2 * (lane % 4) + e; }
    __device__ __forceinline__ int channel(int n, int e) const { return channel_group * kGroupChannels + column(n, e); }

    // The place of element (row, channel) of the resident tile.
    __device__ __forceinline__ T *resident(int row, int channel) const {
        const int slab = channel / kSlabChannels, chunk = channel % kSlabChannels / 8 ^ row % 8;
        char *at = memory + slab * kResidentSlabBytes + row * kSlabRowBytes + chunk * 16;
        return reinterpret_cast<T *>(at) + channel % 8;
    }

#ifdef CACO_SM90A
    // The block's whole work: start_copies() by one thread of the first warpgroup, help() by its second warp, compute()
    // by the other two warpgroups.
    template <class StartCopies, class Compute, class Help>
    __device__ __forceinline__ void run(StartCopies &&start_copies, Compute &&compute, Help &&help) const {
        if (threadIdx.x == 0) {
            for (int at = 0; at < kStages; at++) {
                mbarrier_init(full(at), 1);
                mbarrier_init(empty(at), 4 * kComputeWarpgroups);
            }
            mbarrier_init(resident_full(), 1);
            mbarrier_init_fence();
        }
        __syncthreads();
        if (threadIdx.x < kWarpgroupThreads) {
            give_registers_back<kProducerRegisters>();
            if (threadIdx.x == 0) start_copies();
            else if (threadIdx.x / 32 == 1) help();
        } else {
            take_registers<kComputeRegisters>();
            compute();
        }
    }
    template <class StartCopies, class Compute>
    __device__ __forceinline__ void run(StartCopies &&start_copies, Compute &&compute) const {
        run(start_copies, compute, [] {});
    }

    // Starts the copy of the resident rows from first_row on.
    __device__ __forceinline__ void copy_resident(const TensorMap *map, int64_t first_row) const {
        mbarrier_arrive_expect(resident_full(), kResidentBytes);
#pragma unroll 1  // the producer has few registers
        for (int slab = 0; slab < kSlabs; slab++) {
            tma_load(memory + slab * kResidentSlabBytes, map, slab * kSlabChannels, int(first_row), resident_full());
        }
    }

    // Starts the copies of `tiles` tiles from first_tile on, in ascending or descending order, each as its stage is
    // free. copy_more(tile, stage) starts further copies of kMoreBytes into the stage.
    template <bool kDescending, int kMoreBytes, class CopyMore>
    __device__ __forceinline__ void copy_stream(const TensorMap *map, int64_t first_tile, int tiles,
                                                CopyMore &&copy_more) const {
#pragma unroll 1
        for (int t = 0; t < tiles; t++) {
            const int at = t % kStages;
            mbarrier_wait(empty(at), (t / kStages & 1) ^ 1);
            mbarrier_arrive_expect(full(at), kStageBytes + kMoreBytes);
            const int64_t tile = first_tile + (kDescending ? tiles - 1 - t : t);
            copy_more(tile, at);
#pragma unroll 1
            for (int slab = 0; slab < kSlabs; slab++) {
                tma_load(stage(at) + slab * kStageSlabBytes, map, slab * kSlabChannels, int(tile * kColumns), full(at));
            }
        }
    }
    template <bool kDescending>
    __device__ __forceinline__ void copy_stream(const TensorMap *map, int64_t first_tile, int tiles) const {
        copy_stream<kDescending, 0>(map, first_tile, tiles, [](int64_t, int) {});
    }

    // This warp has read the stage: its products are complete.
    __device__ __forceinline__ void release(int at) const {
        if (lane == 0) mbarrier_arrive(empty(at));
    }

    // Between the computing warpgroups.
    __device__ __forceinline__ void barrier() const { named_barrier<1, kWarpgroupThreads * kComputeWarpgroups>(); }

    // Starts the products; one group.
    __device__ __forceinline__ void scores(Scores &s, const char *streamed) const {
        const Operand a = swizzled_operand(memory + 64 * kSlabRowBytes * row_group, 0);
        const Operand b = swizzled_operand(streamed, 0);
#pragma unroll
        for (int k = 0; k < kPadded / 16; k++) {
            const int slab = k / 4, within = k % 4 * 32;  // 16 channels are 32 bytes of a slab's row
            wgmma_scores<T>(s, further_by(a, slab * kResidentSlabBytes + within),
                            further_by(b, slab * kStageSlabBytes + within), k > 0);
        }
        wgmma_commit();
    }

    // Starts the products; one group. `weights` must stay as they are until it is waited for.
    __device__ __forceinline__ void accumulate(Accumulator &o, const Weights &weights, const char *streamed) const {
        constexpr int kGroupBytes = kGroupChannels / kSlabChannels * kStageSlabBytes;
        const Operand b = swizzled_operand(streamed + channel_group * kGroupBytes, kStageSlabBytes);
#pragma unroll
        for (int k = 0; k < kColumns / 16; k++) {
            wgmma_accumulate<T>(o, weights[k], further_by(b, 16 * k * kSlabRowBytes));
        }
        wgmma_commit();
    }
#endif

    // The layout of a score fragment is that of an A operand, so the weights go from registers to registers.
    __device__ static __forceinline__ void pack_weights(Weights &weights, const Scores &s) {
#pragma unroll
        for (int k = 0; k < kColumns / 16; k++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const auto &fragment = s[2 * k + r / 2];
                weights[k][r] = pack<T>(fragment[r % 2 * 2], fragment[r % 2 * 2 + 1]);
            }
        }
    }

   private:
    __device__ __forceinline__ Mbarrier *barriers() const { return reinterpret_cast<Mbarrier *>(memory + kTileBytes); }
};

// Rows of queries or keys, and the run of the bank that a block passes over; in a grid (row tiles, splits).
template <class Tile>
struct Run {
    int64_t first_row, first_tile;
    int tiles;
    __device__ __forceinline__ Run(int64_t bank_rows, int tiles_per_split)
        : first_row(int64_t(blockIdx.x) * Tile::kRows), first_tile(int64_t(blockIdx.y) * tiles_per_split) {
        const int64_t tiles_left = ceil_div(bank_rows, Tile::kColumns) - first_tile;
        tiles = int(tiles_per_split < tiles_left ? tiles_per_split : tiles_left);
    }
};

template <int kFragments>
__device__ __forceinline__ void set_zero(float (&fragments)[kFragments][4]) {
#pragma unroll
    for (auto &fragment : fragments) {
#pragma unroll
        for (float &value : fragment) value = 0.f;
    }
}

// Rows of the bank's last tile beyond the bank are zeros and no candidates. `columns`: how many of this tile are of
// the bank.
template <class Tile>
__device__ __forceinline__ void mask(const Tile &tile, typename Tile::Scores &s, int64_t columns) {
    if (columns >= Tile::kColumns) return;
#pragma unroll
    for (int n = 0; n < Tile::kColumns / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (tile.column(n, e) >= columns) s[n][e] = s[n][e + 2] = -INFINITY;
        }
    }
}

// A computing warpgroup's place in the ring.
template <int kStages>
struct Turn {
    int stage = 0;
    unsigned parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

}  // namespace caco::sm90
