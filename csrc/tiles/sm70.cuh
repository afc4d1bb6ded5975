// How a warp computes on tiles with mma.m8n8k4 and synchronous copies (V100; Turing runs it too, more slowly).
//
// mma.m8n8k4 does four products [8, 4] x [4, 8] at once, one per "quadpair" of lanes (primitives.cuh). A warp arranges
// them as a 2 x 2 of quadpairs, [16, 4] x [4, 16]: bit 3 of the lane says which 8 of the 16 rows, bit 2 which 8 of the
// 16 columns. Which ones those are is free, and chosen so that no two of the 8 lanes of a phase of a 16-byte read touch
// different rows of one group of banks: rows (or columns) 4 x bit + {0..3, 8..11}.
//
// The next tile is read into registers while the present one is worked on, and stored when all warps are done with it:
// registers are the second buffer. So two blocks fit a V100 multiprocessor, and one a Turing one (64 KB).
#pragma once
#include "tile.cuh"

namespace caco::sm70 {

struct Instructions {
    static constexpr bool kCompiled = kArch == 0 || (kArch >= 700 && kArch < 800);
    static constexpr int kWarps = 4, kStages = 1;
    static constexpr int kMostTileBytes = 48 * 1024, kMostBytes = 64 * 1024;
    static constexpr bool kLoadsAhead = false;  // at P = 512 it would spill; a V100's other block runs meanwhile
    static constexpr int columns(int padded) { return padded >= 256 ? 16 : padded == 128 ? 32 : 64; }

    // A lane holds, of its quadpair's 8 x 8 elements, rows (lane & 1) + 4 (lane / 16) and 2 further, each in pairs at
    // (lane & 2) and 4 further.
    static constexpr int kRowLane = 2;
    __device__ static __forceinline__ int half_row(int lane) { return (lane & 1) + (lane >> 2 & 2) + (lane >> 2 & 4); }
    __device__ static __forceinline__ int row_of(int half_row, int half) {
        return (half_row & 1) + 2 * half + 2 * (half_row & 2) + 2 * (half_row & 4);
    }
    __device__ static __forceinline__ int half_of(int row) { return row >> 1 & 1; }
    __device__ static __forceinline__ int half_row_of(int row) { return (row & 1) + (row >> 1 & 6); }
    __device__ static __forceinline__ int pair(int lane) { return lane & 6; }
    // Fragment n = 8 N + 4 j + 2 f + b; see accumulate.
    __device__ static __forceinline__ int channel(int lane, int n) {
        return n / 8 * 64 + 8 * (lane & 4) + 16 * (n & 1) + 2 * (n & 4) + 2 * (n & 2) + (lane & 2);
    }

    // The offset with `chunks` XORed into its chunk. As chunk c of row r is stored at c ^ (r % 8), that is `chunks`
    // further in the row where those bits of c are 0, and 4 adds what 4 rows further change.
    __device__ static __forceinline__ int further(int offset, int chunks) {
        return (offset ^ (8 * (chunks % 8))) + 64 * (chunks / 8);
    }

    // Of 16 rows as A or 16 columns as B, the one that this lane reads, where `bit` of its number names the quadpair.
    __device__ static __forceinline__ int operand_row(int lane, int bit) {
        return lane % 4 + 4 * (lane >> bit & 1) + 8 * (lane / 16);
    }

    // A chunk holds 8 channels of one row: two steps of 4 along k.
    template <class Tile>
    __device__ static __forceinline__ void scores(const Tile &tile, typename Tile::Scores &s,
                                                  const typename Tile::T *streamed) {
        const int a_offset = Tile::offset(16 * tile.row_group + operand_row(tile.lane, 3), 0);
        const int b_offset = Tile::offset(operand_row(tile.lane, 2), 0);
#pragma unroll
        for (int chunk = 0; chunk < Tile::kChunks; chunk++) {
            uint32_t a[4];
            load_shared_16(a, tile.resident + further(a_offset, chunk));
#pragma unroll
            for (int n = 0; n < Tile::kColumns / 8; n += 2) {
                uint32_t b[4];
                load_shared_16(b, streamed + 8 * n * Tile::kPadded + further(b_offset, chunk));
                mma_m8n8k4<kColumnsOfB>(s[n], s[n + 1], a[0], a[1], b[0], b[1]);
                mma_m8n8k4<kColumnsOfB>(s[n], s[n + 1], a[2], a[3], b[2], b[3]);
            }
        }
    }

    // A chunk holds 8 channels of one streamed row: 4 each for two products f. Of the 8 chunks of a group N of 64
    // channels, lanes with bit 2 set take the last four, and of four, lanes from 16 on (b) the last two; j counts them.
    template <class Tile>
    __device__ static __forceinline__ void accumulate(const Tile &tile, typename Tile::Accumulator &o,
                                                      const typename Tile::Scores &weights,
                                                      const typename Tile::T *streamed) {
        const int lane = tile.lane;
        const int b_offset =
            Tile::offset(lane % 4, (lane & 4) + 2 * (lane / 16)) + tile.channel_group * Tile::kGroupChannels;
#pragma unroll
        for (int n = 0; n < Tile::kColumns / 8; n++) {
            uint32_t own[2], other[2];
            as_operand(own, weights[n], lane);
#pragma unroll
            for (int r = 0; r < 2; r++) other[r] = __shfl_xor_sync(kFullWarp, own[r], 4);
#pragma unroll
            for (int k = 0; k < 2; k++) {  // columns 8 n + 4 k + {0..3} are with the quadpairs whose bit 2 is k
                const bool mine = (lane >> 2 & 1) == k;
                const uint32_t a0 = mine ? own[0] : other[0], a1 = mine ? own[1] : other[1];
                const typename Tile::T *rows = streamed + (8 * n + 4 * k) * Tile::kPadded;
#pragma unroll
                for (int m = 0; m < Tile::kGroupChannels / 8; m += 4) {
                    uint32_t b[4];
                    load_shared_16(b, rows + further(b_offset, 4 * k + m / 8 * 8 + m / 4 % 2));
                    mma_m8n8k4<kRowsOfB>(o[m], o[m + 1], a0, a1, b[0], b[1]);
                    mma_m8n8k4<kRowsOfB>(o[m + 2], o[m + 3], a0, a1, b[2], b[3]);
                }
            }
        }
    }

    // Four elements of a score fragment (two rows, two columns) -> four columns of one row, as an A operand holds them:
    // lanes l and l ^ 2 exchange the row that is the other's.
    __device__ static __forceinline__ void as_operand(uint32_t (&operand)[2], const float (&scores)[4], int lane) {
        const uint32_t half0 = pack<fp16>(scores[0], scores[1]), half1 = pack<fp16>(scores[2], scores[3]);
        const bool upper = lane & 2;
        const uint32_t keep = upper ? half1 : half0, got = __shfl_xor_sync(kFullWarp, upper ? half0 : half1, 2);
        operand[0] = upper ? got : keep;
        operand[1] = upper ? keep : got;
    }

    __device__ static __forceinline__ uint4 read(const void *from, bool valid) {
        return valid ? *static_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
    }
    struct CopyResident {
        __device__ __forceinline__ void operator()(int, void *to, const void *from, bool valid) const {
            *static_cast<uint4 *>(to) = read(from, valid);
        }
    };
    struct Fetch {
        uint4 *kept;
        __device__ __forceinline__ void operator()(int which, void *, const void *from, bool valid) const {
            kept[which] = read(from, valid);
        }
    };
    struct Put {
        const uint4 *kept;
        __device__ __forceinline__ void operator()(int which, void *to, const void *, bool) const {
            *static_cast<uint4 *>(to) = kept[which];
        }
    };

    // Runs body(tile, stage) for tiles first .. last - 1. load(tile, stage, copy) names the same copies each time it is
    // called for a tile; here once to read them, once to store them.
    template <class Tile, class Load, class Body>
    __device__ static __forceinline__ void stream(const Tile &tile, int64_t first, int64_t last, Load &&load,
                                                  Body &&body) {
        uint4 kept[Tile::kCopies + 1];  // one more for what a kernel copies besides the tile
        if (first < last) load(first, tile.stage(first), CopyResident{});
        __syncthreads();
        for (int64_t t = first; t < last; t++) {
            if (t + 1 < last) load(t + 1, tile.stage(t + 1), Fetch{kept});
            body(t, tile.stage(t));
            __syncthreads();
            if (t + 1 < last) load(t + 1, tile.stage(t + 1), Put{kept});
            __syncthreads();
        }
    }
};

template <int kPadded>
using Tile = caco::Tile<Instructions, fp16, kPadded>;

}  // namespace caco::sm70
