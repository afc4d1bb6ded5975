// The tiles of the kernels that the sm_70 and sm_80 paths share (bank_*/tiles.cuh). The Instructions of a path say how a
// warp loads them and computes on them.
//
// Both products run on the same two tiles: a resident tile stays in shared memory, streamed tiles of the other operand
// pass through stages and serve as keys and as values.
//
//   scores      S [16 rows of a warp, columns] = resident [rows, P] . streamed [columns, P]^T
//   accumulate  O [16 rows of a warp, P]      += weights(S) . streamed [columns, P]
//
// A warp owns 16 resident rows; a lane holds two of them in every fragment ("half" 0 and 1), in pairs of neighbouring
// columns (e = 0, 1), and four lanes share a row. At P = 512 the accumulator would need 256 registers, so two warps
// share 16 rows: both compute the scores, each accumulates half of the channels.
//
// Rows of a tile lie contiguous; the 16-byte chunk c of row r is stored at chunk c ^ (r % 8), so that reading one chunk
// column of 8 consecutive rows falls into 8 different groups of banks.
//
// Instructions (sm70.cuh, sm80.cuh) have: kCompiled, kWarps, kStages, columns(P), kMostTileBytes, kMostBytes,
// kLoadsAhead; the places of a lane's elements (half_row, row_of, half_of, half_row_of, pair, channel, kRowLane); CopyResident, stream, scores
// and accumulate.
#pragma once
#include "rows.cuh"

namespace caco {

template <class Instructions, class T_, int kPadded_>
struct Tile {
    using T = T_;
    static constexpr bool kCompiled = Instructions::kCompiled;  // for this architecture; elsewhere kernels are empty
    static constexpr int kPadded = kPadded_;
    static constexpr int kWarps = Instructions::kWarps;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kChannelGroups = kPadded == 512 ? 2 : 1;    // warps that share 16 rows
    static constexpr int kRows = 16 * kWarps / kChannelGroups;       // resident
    static constexpr int kColumns = Instructions::columns(kPadded);  // streamed
    static constexpr int kGroupChannels = kPadded / kChannelGroups;  // that a warp accumulates
    static constexpr int kStages = Instructions::kStages;
    static constexpr int kChunks = kPadded / 8;                    // of 16 bytes in a row
    static constexpr int kCopies = kColumns * kChunks / kThreads;  // of chunks of a streamed tile, per thread
    static constexpr int kMostBytes = Instructions::kMostBytes;    // of shared memory, all in all
    // Whether a warp that ends the step loads its next row of the bank before it works on this one.
    static constexpr bool kLoadsAhead = Instructions::kLoadsAhead;
    static constexpr int kRowLane = Instructions::kRowLane;  // lanes 0, 1, 2, 3 times this share a row
    static constexpr int kResidentBytes = kRows * kPadded * kOperandBytes;
    static constexpr int kStageBytes = kColumns * kPadded * kOperandBytes;
    static constexpr int kTileBytes = kResidentBytes + kStages * kStageBytes;

    static_assert(sizeof(T) == kOperandBytes);
    static_assert(kGroupChannels % 64 == 0, "a warp's channels begin at a whole group of 8 chunks");
    static_assert(kChunks % 8 == 0, "the swizzle permutes chunks within groups of 8");
    static_assert(kColumns % 16 == 0 && kGroupChannels % 16 == 0, "products take steps of 16");
    static_assert(kGroupChannels <= 256, "a larger accumulator does not fit the registers");
    static_assert(kTileBytes <= Instructions::kMostTileBytes, "the path's smallest GPU has no more");

    using CopyResident = typename Instructions::CopyResident;
    using Scores = float[kColumns / 8][4];  // [n][2 half + e]
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

    // Of the rows of one half, 8 per row group, the one that this lane holds; and the resident row that it is.
    __device__ __forceinline__ int half_row() const { return 8 * row_group + Instructions::half_row(lane); }
    __device__ static __forceinline__ int row_of(int half_row, int half) {
        return half_row / 8 * 16 + Instructions::row_of(half_row % 8, half);
    }
    // The other way round: the half and the half_row of a resident row.
    __device__ static __forceinline__ int half_of(int row) { return Instructions::half_of(row % 16); }
    __device__ static __forceinline__ int half_row_of(int row) {
        return row / 16 * 8 + Instructions::half_row_of(row % 16);
    }
    __device__ __forceinline__ int row(int half) const {
        return 16 * row_group + Instructions::row_of(Instructions::half_row(lane), half);
    }
    // Which of the four lanes of its rows this one is.
    __device__ __forceinline__ int list() const { return lane / kRowLane % 4; }
    // The column, within the tile, of element e (0 or 1) of score fragment n; ascending in n, then e.
    __device__ __forceinline__ int column(int n, int e) const { return 8 * n + Instructions::pair(lane) + e; }
    __device__ __forceinline__ int channel(int n, int e) const {
        return channel_group * kGroupChannels + Instructions::channel(lane, n) + e;
    }

    // Where a chunk of a row begins, in elements.
    __device__ static __forceinline__ int offset(int row, int chunk) { return row * kPadded + (chunk ^ (row % 8)) * 8; }

    // Copies rows first .. first + kCount - 1 of source [total, P], each chunk by copy(n, to, from, valid), where n
    // counts this thread's chunks; rows beyond the source become zeros.
    template <int kCount, class Copy>
    __device__ static __forceinline__ void load(const Copy &copy, T *tile, const T *__restrict__ source, int64_t first,
                                                int64_t total) {
        static_assert(kCount * kChunks % kThreads == 0, "every thread copies the same number of chunks");
#pragma unroll
        for (int i = 0; i < kCount * kChunks / kThreads; i++) {
            const int chunk = (i * kThreads + threadIdx.x) % kChunks, row = (i * kThreads + threadIdx.x) / kChunks;
            const bool valid = first + row < total;
            copy(i, tile + offset(row, chunk), source + (valid ? first + row : 0) * kPadded + 8 * chunk, valid);
        }
    }

    __device__ __forceinline__ void scores(Scores &s, const T *streamed) const {
#pragma unroll
        for (auto &fragment : s) {
#pragma unroll
            for (float &value : fragment) value = 0.f;
        }
        Instructions::scores(*this, s, streamed);
    }

    // Runs body(tile, stage) for the streamed tiles first .. last - 1, in order. load(tile, stage, copy) calls load
    // above, and may make one more copy per thread, number kCopies. What was stored before the call is there for all
    // threads in `body`, and after the call the tiles' memory is free.
    template <class Load, class Body>
    __device__ __forceinline__ void stream(int64_t first, int64_t last, Load &&load, Body &&body) const {
        Instructions::stream(*this, first, last, load, body);
    }

    __device__ __forceinline__ void accumulate(Accumulator &o, const Scores &weights, const T *streamed) const {
        Instructions::accumulate(*this, o, weights, streamed);
    }
};

}  // namespace caco
