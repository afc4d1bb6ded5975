// bank_select on wgmma and TMA: index_i = argmax_j k_i . u_j, ties to the lowest index.
//
// Tile map   as attend's, with keys for queries, ascending tiles, and at P = 512 tiles of its own. Each of the four
//            lanes of a row keeps the best two of the columns that it sees; settle_select compares those that rounding
//            leaves in question in f32. The contract is that of tiles.cuh.
// Overlap    one computing warpgroup compares while the other one's products are under way. By instruction counts,
//            comparing should take about a third of the products' time (not measured).
// Bytes      reads 2 K P per row tile and 2 R P; writes 64 R splits bytes of candidates.
// Flop       2 R K P. Limits: K < 2^31; C <= 512.
#include "../tiles/sm90.cuh"
#include "bank_select.h"

namespace caco::sm90 {
namespace {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    select_kernel(const __grid_constant__ TensorMap keys,  // [R, P]
                  const __grid_constant__ TensorMap bank,  // [K, P]
                  BestTwo *__restrict__ candidates,        // [S, R, lists]
                  int64_t rows, int64_t bank_rows, int tiles_per_split) {
#ifdef CACO_SM90A
    const Tile tile(shared_memory());
    const Run<Tile> run(bank_rows, tiles_per_split);

    auto start_copies = [&] {
        tile.copy_resident(&keys, run.first_row);
        tile.template copy_stream<false>(&bank, run.first_tile, run.tiles);
    };
    auto compute = [&] {
        typename Tile::Scores s;
        set_zero(s);
        Turn<Tile::kStages> turn;
        BestTwo best[2];
#pragma unroll
        for (BestTwo &two : best) two = {{-INFINITY, -INFINITY}, {-1, -1}};

        mbarrier_wait(tile.resident_full(), 0);
        for (int t = 0; t < run.tiles; t++, turn.next()) {
            mbarrier_wait(tile.full(turn.stage), turn.parity);
            wgmma_fence();
            tile.scores(s, tile.stage(turn.stage));
            wgmma_wait<0>(s);
            tile.release(turn.stage);
            const int64_t first_column = (run.first_tile + t) * Tile::kColumns;
            mask(tile, s, bank_rows - first_column);
#pragma unroll
            for (int n = 0; n < Tile::kColumns / 8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = int(first_column) + tile.column(n, e);
                    // Columns come in ascending order, so a strict comparison keeps the lower index on ties.
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        BestTwo &two = best[half];
                        const float score = s[n][2 * half + e];
                        if (score > two.score[0]) {
                            two = {{score, two.score[0]}, {column, two.index[0]}};
                        } else if (score > two.score[1]) {
                            two.score[1] = score, two.index[1] = column;
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t row = run.first_row + tile.row(half);
            if (row < rows) candidates[(blockIdx.y * rows + row) * kListsPerRow + tile.lane % 4] = best[half];
        }
    };
    tile.run(start_copies, compute);
#endif
}

}  // namespace
}  // namespace caco::sm90

namespace caco {

template <>
Split BankSelect<Path::kSm90>::split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors) {
    Split split{};
    for_padded_channels(channels, [&](auto padded) {
        using Shape = sm90::Tile<bf16, padded(), 1>;
        split = split_bank(rows, bank_rows, Shape::kRows, Shape::kColumns, multiprocessors);
    });
    return split;
}

template <>
int BankSelect<Path::kSm90>::shared_bytes(int channels) {
    int bytes = 0;
    for_padded_channels(channels, [&](auto padded) { bytes = sm90::Tile<bf16, padded(), 1>::kSharedBytes; });
    return bytes;
}

template <>
void BankSelect<Path::kSm90>::enqueue(const SelectParams &params, const Target &target) {
    const Split split = BankSelect::split(params.rows, params.bank_rows, params.channels, target.multiprocessors);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        using Shape = sm90::Tile<decltype(operand), padded(), 1>;
        const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, Shape::kRows)), split.splits);
        launch("bank_select", sm90::select_kernel<Shape>, grid, Shape::kThreads, Shape::kSharedBytes, target.stream,
               make_tensor_map(params.keys, params.rows, Shape::kPadded, params.type, Shape::kRows),
               make_tensor_map(params.bank, params.bank_rows, Shape::kPadded, params.type, Shape::kColumns),
               static_cast<BestTwo *>(params.workspace), params.rows, params.bank_rows, split.tiles);
    });
    settle_select(params, split.splits, target);
}

}  // namespace caco
