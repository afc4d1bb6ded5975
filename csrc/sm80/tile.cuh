// The tile loop's building blocks for mma.m16n8k16 with ldmatrix and cp.async (A100 and later).
//
// Both products run on the same two tiles: a resident tile stays in shared memory, streamed tiles of the other operand
// pass through a ring of two stages and serve as keys and as values.
//
//   scores      S [16 rows of a warp, columns] = resident [rows, P] . streamed [columns, P]^T
//   accumulate  O [16 rows of a warp, P]      += weights(S) . streamed [columns, P]
//
// A warp owns 16 resident rows. At P = 512 its accumulator would need 256 registers, so two warps share 16 rows: both
// compute the scores, each accumulates half of the channels.
//
// Rows of a tile lie contiguous; the 16-byte chunk c of row r is stored at chunk c ^ (r % 8). ldmatrix reads one chunk
// column of 8 consecutive rows at a time, which then fall into 8 different groups of banks.
#pragma once
#include "../rows.cuh"
#include "path.h"

namespace caco::sm80 {

template <class T_, int kPadded_>
struct Tile {
    using T = T_;
    static constexpr int kPadded = kPadded_;
    static constexpr int kWarps = 8;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kChannelGroups = kPadded == 512 ? 2 : 1;                    // warps that share 16 rows
    static constexpr int kRows = 16 * kWarps / kChannelGroups;                       // resident
    static constexpr int kColumns = kPadded == 512 ? 16 : kPadded == 256 ? 32 : 64;  // streamed
    static constexpr int kGroupChannels = kPadded / kChannelGroups;                  // that a warp accumulates
    static constexpr int kStages = 2;
    static constexpr int kChunks = kPadded / 8;  // of 16 bytes in a row
    static constexpr int kResidentBytes = kRows * kPadded * kOperandBytes;
    static constexpr int kStageBytes = kColumns * kPadded * kOperandBytes;
    static constexpr int kTileBytes = kResidentBytes + kStages * kStageBytes;

    static_assert(sizeof(T) == kOperandBytes);
    static_assert(kGroupChannels % 64 == 0, "a warp's channels begin at a whole group of 8 chunks");
    static_assert(kChunks % 8 == 0, "the swizzle permutes chunks within groups of 8");
    static_assert(kColumns % 16 == 0 && kGroupChannels % 16 == 0, "mma.m16n8k16 takes steps of 16");
    static_assert(kGroupChannels <= 256, "a larger accumulator does not fit the registers");
    static_assert(kTileBytes <= 96 * 1024, "sm_86, sm_89 and sm_120 have 99 KB per block");

    using Scores = float[kColumns / 8][4];
    using Accumulator = float[kGroupChannels / 8][4];

    T *resident;  // [kRows, P]
    T *stages;    // [kStages, kColumns, P]
    int lane, row_group, channel_group;

    __device__ __forceinline__ explicit Tile(char *memory) {
        const int warp = threadIdx.x / 32;
        resident = reinterpret_cast<T *>(memory);
        stages = reinterpret_cast<T *>(memory + kResidentBytes);
        lane = threadIdx.x % 32;
        row_group = warp / kChannelGroups;
        channel_group = warp % kChannelGroups;
    }

    __device__ __forceinline__ T *stage(int64_t tile) const { return stages + (tile % kStages) * kColumns * kPadded; }

    // The resident rows of this lane's two halves of a fragment.
    __device__ __forceinline__ int row(int half) const { return 16 * row_group + lane / 4 + 8 * half; }
    // The column, within the tile, of element e (0 or 1) of score fragment n.
    __device__ __forceinline__ int column(int n, int e) const { return 8 * n + 2 * (lane % 4) + e; }
    __device__ __forceinline__ int channel(int n, int e) const { return channel_group * kGroupChannels + column(n, e); }

    // Where a chunk of a row begins, in elements.
    __device__ static __forceinline__ int offset(int row, int chunk) { return row * kPadded + (chunk ^ (row % 8)) * 8; }

    // The same row 2 k chunks further, from the offset of its chunk 0 or 1: a fixed place for each k but for two bits.
    __device__ static __forceinline__ int further(int offset, int k) {
        return (offset ^ (16 * (k % 4))) + 64 * (k / 4);
    }

    // Starts the copy of rows first .. first + kCount - 1 of source [total, P]; rows beyond it become zeros.
    template <int kCount>
    __device__ static __forceinline__ void load(T *tile, const T *__restrict__ source, int64_t first, int64_t total) {
        static_assert(kCount * kChunks % kThreads == 0, "every thread copies the same number of chunks");
#pragma unroll
        for (int i = 0; i < kCount * kChunks / kThreads; i++) {
            const int chunk = (i * kThreads + threadIdx.x) % kChunks, row = (i * kThreads + threadIdx.x) / kChunks;
            const bool valid = first + row < total;
            copy_async_16(tile + offset(row, chunk), source + (valid ? first + row : 0) * kPadded + 8 * chunk, valid);
        }
    }

    __device__ __forceinline__ void scores(Scores &s, const T *streamed) const {
#pragma unroll
        for (auto &fragment : s) {
#pragma unroll
            for (float &value : fragment) value = 0.f;
        }
        const int a_offset = offset(16 * row_group + lane % 16, lane / 16);
        const int b_offset = offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < kPadded / 16; k++) {
            uint32_t a[4];
            ldmatrix_x4<false>(a, resident + further(a_offset, k));
#pragma unroll
            for (int n = 0; n < kColumns / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4<false>(b, streamed + 16 * n * kPadded + further(b_offset, k));
                mma_m16n8k16<T>(s[2 * n], a, b[0], b[1]);
                mma_m16n8k16<T>(s[2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    // The layout of a score fragment is that of an A fragment, so the weights go from registers to registers.
    __device__ __forceinline__ void accumulate(Accumulator &o, const Scores &weights, const T *streamed) const {
        const int b_offset = offset(lane % 16, lane / 16) + channel_group * kGroupChannels;
#pragma unroll
        for (int k = 0; k < kColumns / 16; k++) {
            const uint32_t a[4] = {pack<T>(weights[2 * k][0], weights[2 * k][1]),
                                   pack<T>(weights[2 * k][2], weights[2 * k][3]),
                                   pack<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]),
                                   pack<T>(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < kGroupChannels / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4<true>(b, streamed + 16 * k * kPadded + further(b_offset, n));
                mma_m16n8k16<T>(o[2 * n], a, b[0], b[1]);
                mma_m16n8k16<T>(o[2 * n + 1], a, b[2], b[3]);
            }
        }
    }
};

// Runs body(tile, stage) for tiles first .. last - 1 while the next one is copied. load(tile, stage) starts a copy;
// copies started before the call (the resident tile) belong to the first tile's group.
//
// One barrier a tile serves both hazards: it comes after each thread's wait for its own copies, so the tile is whole,
// and after everyone's reading of the other stage, so that may be refilled.
template <class Tile, class Load, class Body>
__device__ __forceinline__ void stream_tiles(const Tile &tile, int64_t first, int64_t last, Load &&load, Body &&body) {
    if (first < last) load(first, tile.stage(first));
    copy_async_commit();
    for (int64_t t = first; t < last; t++) {
        copy_async_wait<0>();
        __syncthreads();
        if (t + 1 < last) load(t + 1, tile.stage(t + 1));
        copy_async_commit();
        body(t, tile.stage(t));
    }
    copy_async_wait<0>();
    __syncthreads();  // after this the caller may reuse the tiles' memory
}

}  // namespace caco::sm80
