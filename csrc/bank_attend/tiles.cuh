// bank_attend on the tiles of ../tiles/tile.cuh: lse_i = log sum_j exp(s_ij / t), mean row
// O_i = sum_j softmax_j(s_ij / t) u_j.
//
// Tile map   grid (row tiles, splits); a block holds kRows queries and passes over its split's run of the bank in tiles
//            of kColumns rows, which are keys and values at once. Scores and probabilities never leave the registers.
// Softmax    a running maximum m per row: p = exp((s - m) / t), and when m grows, the sums so far shrink by exp of the
//            difference. No bound on |q| or t is assumed and nothing can underflow in a row as a whole. Once the
//            maximum has settled, after some hundred columns, the rescale is skipped by a warp-uniform branch. p enters
//            the second product as 2^14 p in operand type; the sum l is of the unrounded p.
// Bytes      reads 2 K P per row tile (from the L2 cache when several blocks share a split) and 2 R P; writes
//            4 R P splits of partial sums, which the merge reads again.
// Flop       4 R K P (6 R K P at P = 512, where two warps share each row of scores).
// Limits     K < 2^31; C <= 512.
#pragma once
#include "../tiles/tile.cuh"
#include "bank_attend.h"

namespace caco {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attend_kernel(const typename Tile::T *__restrict__ queries,  // [R, P]
                  const typename Tile::T *__restrict__ bank,     // [K, P]
                  float *__restrict__ sums,                      // [S, R, P]
                  RowStatistics *__restrict__ statistics,        // [S, R]
                  int64_t rows, int64_t bank_rows, int tiles_per_split, float scale0, float scale1,
                  bool two_temperatures) {
    if constexpr (Tile::kCompiled) {
        const Tile tile(shared_memory());
        const int64_t first_row = int64_t(blockIdx.x) * Tile::kRows;
        const int64_t first_tile = int64_t(blockIdx.y) * tiles_per_split;
        const int64_t tiles = ceil_div(bank_rows, Tile::kColumns);
        const int64_t last_tile = first_tile + tiles_per_split < tiles ? first_tile + tiles_per_split : tiles;

        typename Tile::Accumulator o;
#pragma unroll
        for (auto &fragment : o) {
#pragma unroll
            for (float &value : fragment) value = 0.f;
        }
        float maximum[2] = {-INFINITY, -INFINITY};         // of this lane's two rows; the same in a row's four lanes
        float sum0[2] = {0.f, 0.f}, sum1[2] = {0.f, 0.f};  // over this lane's columns

        Tile::template load<Tile::kRows>(typename Tile::CopyResident{}, tile.resident, queries, first_row, rows);
        auto load = [&](int64_t t, typename Tile::T *stage, auto copy) {
            Tile::template load<Tile::kColumns>(copy, stage, bank, t * Tile::kColumns, bank_rows);
        };
        tile.stream(first_tile, last_tile, load, [&](int64_t t, const typename Tile::T *stage) {
            typename Tile::Scores s;
            tile.scores(s, stage);
            if ((t + 1) * Tile::kColumns > bank_rows) {  // the last tile is ragged: its zero rows are no candidates
#pragma unroll
                for (int n = 0; n < Tile::kColumns / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if (t * Tile::kColumns + tile.column(n, e) >= bank_rows) s[n][e] = s[n][e + 2] = -INFINITY;
                    }
                }
            }
            float larger[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                larger[half] = maximum[half];
#pragma unroll
                for (int n = 0; n < Tile::kColumns / 8; n++) {
                    larger[half] = fmaxf(larger[half], fmaxf(s[n][2 * half], s[n][2 * half + 1]));
                }
                larger[half] = fmaxf(larger[half], __shfl_xor_sync(kFullWarp, larger[half], Tile::kRowLane));
                larger[half] = fmaxf(larger[half], __shfl_xor_sync(kFullWarp, larger[half], 2 * Tile::kRowLane));
            }
            if (__any_sync(kFullWarp, larger[0] > maximum[0] || larger[1] > maximum[1])) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float shrink = fast_exp2((maximum[half] - larger[half]) * scale0);
                    sum0[half] *= shrink;
                    if (two_temperatures) sum1[half] *= fast_exp2((maximum[half] - larger[half]) * scale1);
#pragma unroll
                    for (auto &fragment : o) fragment[2 * half] *= shrink, fragment[2 * half + 1] *= shrink;
                    maximum[half] = larger[half];
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float shift0 = kProbabilityScaleLog2 - maximum[half] * scale0, shift1 = -maximum[half] * scale1;
#pragma unroll
                for (int n = 0; n < Tile::kColumns / 8; n++) {
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        if (two_temperatures) sum1[half] += fast_exp2(fmaf(s[n][e], scale1, shift1));
                        s[n][e] = fast_exp2(fmaf(s[n][e], scale0, shift0));
                        sum0[half] += s[n][e];
                    }
                }
            }
            tile.accumulate(o, s, stage);
        });

        constexpr float kUnscale = 1.f / (1 << int(kProbabilityScaleLog2));
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int bits = Tile::kRowLane; bits <= 2 * Tile::kRowLane; bits *= 2) {
                sum0[half] += __shfl_xor_sync(kFullWarp, sum0[half], bits);
                sum1[half] += __shfl_xor_sync(kFullWarp, sum1[half], bits);
            }
            const int64_t row = first_row + tile.row(half);
            if (row >= rows) continue;
            const int64_t at = blockIdx.y * rows + row;
#pragma unroll
            for (int n = 0; n < Tile::kGroupChannels / 8; n++) {
                *reinterpret_cast<float2 *>(sums + at * Tile::kPadded + tile.channel(n, 0)) =
                    make_float2(o[n][2 * half] * kUnscale, o[n][2 * half + 1] * kUnscale);
            }
            if (tile.list() == 0 && tile.channel_group == 0) {
                statistics[at] = {maximum[half], {sum0[half] * kUnscale, sum1[half]}, 0.f};
            }
        }
    }
}

template <class Tile>
void launch_attend(const AttendParams &params, Split split, const Target &target) {
    using T = typename Tile::T;
    float *sums = static_cast<float *>(params.workspace);
    auto *statistics = reinterpret_cast<RowStatistics *>(sums + split.splits * params.rows * Tile::kPadded);
    const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, Tile::kRows)), split.splits);
    launch("bank_attend", attend_kernel<Tile>, grid, Tile::kThreads, Tile::kTileBytes, target.stream,
           static_cast<const T *>(params.queries), static_cast<const T *>(params.bank), sums, statistics, params.rows,
           params.bank_rows, split.tiles, kLog2E / params.temperature[0],
           kLog2E / params.temperature[params.temperatures - 1], params.temperatures == 2);
}

}  // namespace caco
