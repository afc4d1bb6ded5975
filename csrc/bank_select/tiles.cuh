// bank_select on the tiles of ../tiles/tile.cuh: index_i = argmax_j k_i . u_j, ties to the lowest index.
//
// Tile map   grid (row tiles, splits); a block holds kRows keys and passes over its split's run of the bank. Each of
//            the four lanes of a row keeps the best two of the columns that it sees, by low-precision score and without
//            communication and without a branch (best_two.cuh); settle_select compares all of them that rounding leaves
//            in question in f32.
// Contract   the chosen row's f32 similarity is the largest among those candidates. A better row can only be missed
//            when one list holds two others that rounding put above it: three rows of the bank within 2^-7 |k| (bf16;
//            2^-10 |k| fp16) of each other and of the maximum, in one list of 4 x splits. Equal rows have equal scores:
//            the lowest index is always kept.
// Bytes      reads 2 K P per row tile and 2 R P; writes 64 R splits bytes of candidates.
// Flop       2 R K P. Limits: K < 2^31; C <= 512; |k| is 0, or between 2^-60 and 2^60.
#pragma once
#include "../tiles/tile.cuh"
#include "best_two.cuh"

namespace caco {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    select_kernel(const typename Tile::T *__restrict__ keys,  // [R, P]
                  const typename Tile::T *__restrict__ bank,  // [K, P]
                  BestTwo *__restrict__ candidates,           // [S, R, lists]
                  int64_t rows, int64_t bank_rows, int tiles_per_split) {
    if constexpr (Tile::kCompiled) {
        const Tile tile(shared_memory());
        const int64_t first_row = int64_t(blockIdx.x) * Tile::kRows;
        const int64_t first_tile = int64_t(blockIdx.y) * tiles_per_split;
        const int64_t tiles = ceil_div(bank_rows, Tile::kColumns);
        const int64_t last_tile = first_tile + tiles_per_split < tiles ? first_tile + tiles_per_split : tiles;
        auto square = [&](int half) {
            const int64_t row = first_row + tile.row(half) < rows ? first_row + tile.row(half) : rows - 1;
            return square_of_row<typename Tile::T, Tile::kPadded>(
                tile.list(), Tile::kRowLane, [&](int chunk) { return keys + row * Tile::kPadded + 8 * chunk; });
        };
        Comparison best[2] = {Comparison(square(0)), Comparison(square(1))};

        Tile::template load<Tile::kRows>(typename Tile::CopyResident{}, tile.resident, keys, first_row, rows);
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
            const int first_column = static_cast<int>(t) * Tile::kColumns + tile.column(0, 0);
#pragma unroll
            for (int half = 0; half < 2; half++) best[half].add(s, half, first_column);
        });
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t row = first_row + tile.row(half);
            if (row < rows && tile.channel_group == 0) {
                candidates[(blockIdx.y * rows + row) * kListsPerRow + tile.list()] = best[half].best;
            }
        }
    }
}

template <class Tile>
void launch_select(const SelectParams &params, Split split, const Target &target) {
    using T = typename Tile::T;
    const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, Tile::kRows)), split.splits);
    launch("bank_select", select_kernel<Tile>, grid, Tile::kThreads, Tile::kTileBytes, target.stream,
           static_cast<const T *>(params.keys), static_cast<const T *>(params.bank),
           static_cast<BestTwo *>(params.workspace), params.rows, params.bank_rows, split.tiles);
}

}  // namespace caco
