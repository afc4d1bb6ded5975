// How a warp computes on tiles with mma.m16n8k16, ldmatrix and cp.async (A100 and later).
#pragma once
#include "tile.cuh"

namespace caco::sm80 {

struct Instructions {
    static constexpr bool kCompiled = kArch == 0 || kArch >= 800;
    static constexpr int kWarps = 8, kStages = 2;
    static constexpr int kMostTileBytes = 96 * 1024;  // sm_86, sm_89 and sm_120 have 99 KB per block
    static constexpr int kMostBytes = 99 * 1024;
    static constexpr bool kLoadsAhead = true;
    static constexpr int columns(int padded) { return padded == 512 ? 16 : padded == 256 ? 32 : 64; }

    // Fragments of D as in primitives.cuh: a lane holds rows lane / 4 and 8 further, in pairs at 2 (lane % 4).
    static constexpr int kRowLane = 1;
    __device__ static __forceinline__ int half_row(int lane) { return lane / 4; }
    __device__ static __forceinline__ int row_of(int half_row, int half) { return half_row + 8 * half; }
    __device__ static __forceinline__ int half_of(int row) { return row / 8; }
    __device__ static __forceinline__ int half_row_of(int row) { return row % 8; }
    __device__ static __forceinline__ int pair(int lane) { return 2 * (lane % 4); }
    __device__ static __forceinline__ int channel(int lane, int n) { return 8 * n + pair(lane); }

    // The same row 2 k chunks further, from the offset of its chunk 0 or 1: a fixed place for each k but for two bits.
    __device__ static __forceinline__ int further(int offset, int k) {
        return (offset ^ (16 * (k % 4))) + 64 * (k / 4);
    }

    template <class Tile>
    __device__ static __forceinline__ void scores(const Tile &tile, typename Tile::Scores &s,
                                                  const typename Tile::T *streamed) {
        const int a_offset = Tile::offset(16 * tile.row_group + tile.lane % 16, tile.lane / 16);
        const int b_offset = Tile::offset(tile.lane % 8 + tile.lane / 16 * 8, tile.lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < Tile::kPadded / 16; k++) {
            uint32_t a[4];
            ldmatrix_x4<false>(a, tile.resident + further(a_offset, k));
#pragma unroll
            for (int n = 0; n < Tile::kColumns / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4<false>(b, streamed + 16 * n * Tile::kPadded + further(b_offset, k));
                mma_m16n8k16<typename Tile::T>(s[2 * n], a, b[0], b[1]);
                mma_m16n8k16<typename Tile::T>(s[2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    // The layout of a score fragment is that of an A fragment, so the weights go from registers to registers.
    template <class Tile>
    __device__ static __forceinline__ void accumulate(const Tile &tile, typename Tile::Accumulator &o,
                                                      const typename Tile::Scores &weights,
                                                      const typename Tile::T *streamed) {
        using T = typename Tile::T;
        const int b_offset = Tile::offset(tile.lane % 16, tile.lane / 16) + tile.channel_group * Tile::kGroupChannels;
#pragma unroll
        for (int k = 0; k < Tile::kColumns / 16; k++) {
            const uint32_t a[4] = {pack<T>(weights[2 * k][0], weights[2 * k][1]),
                                   pack<T>(weights[2 * k][2], weights[2 * k][3]),
                                   pack<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]),
                                   pack<T>(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < Tile::kGroupChannels / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4<true>(b, streamed + 16 * k * Tile::kPadded + further(b_offset, n));
                mma_m16n8k16<T>(o[2 * n], a, b[0], b[1]);
                mma_m16n8k16<T>(o[2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    // Starts a copy into the resident tile or a stage.
    struct Copy {
        __device__ __forceinline__ void operator()(int, void *to, const void *from, bool valid) const {
            copy_async_16(to, from, valid);
        }
    };
    using CopyResident = Copy;

    // Runs body(tile, stage) for tiles first .. last - 1 while the next one is copied. load(tile, stage, copy) starts a
    // copy; copies started before the call (the resident tile) belong to the first tile's group.
    //
    // One barrier a tile serves both hazards: it comes after each thread's wait for its own copies, so the tile is
    // whole, and after everyone's reading of the other stage, so that may be refilled.
    template <class Tile, class Load, class Body>
    __device__ static __forceinline__ void stream(const Tile &tile, int64_t first, int64_t last, Load &&load,
                                                  Body &&body) {
        if (first < last) load(first, tile.stage(first), Copy{});
        copy_async_commit();
        for (int64_t t = first; t < last; t++) {
            copy_async_wait<0>();
            __syncthreads();
            if (t + 1 < last) load(t + 1, tile.stage(t + 1), Copy{});
            copy_async_commit();
            body(t, tile.stage(t));
        }
        copy_async_wait<0>();
        __syncthreads();  // after this the caller may reuse the tiles' memory
    }
};

template <class T, int kPadded>
using Tile = caco::Tile<Instructions, T, kPadded>;

}  // namespace caco::sm80
