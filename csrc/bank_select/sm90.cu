// bank_select on wgmma and TMA: index_i = argmax_j k_i . u_j, ties to the lowest index.
//
// Tile map   as attend's, with keys for queries, ascending tiles, and at P = 512 tiles of its own. Each of the four
//            lanes of a row keeps the best two of the columns that it sees; settle_select compares those that rounding
//            leaves in question in f32. The contract is that of tiles.cuh.
// Overlap    a warpgroup has two sets of scores: tile t is compared (best_two.cuh) while the products of tile t + 1 are
//            under way. The last tile is the only one that may be ragged, and the only one that is masked. By its
//            machine code the loop has 455 instructions a warp and tile at P = 256, 180 of them of the ALU at half
//            rate. A scheduler has two warps, so that is 910 issue slots and 720 cycles of its ALU, while the products
//            take 1536 cycles. Products and copies use shared memory for 1660 cycles: that should be the limit (a
//            prediction).
// Bytes      reads 2 K P per row tile and 2 R P; writes 64 R splits bytes of candidates.
// Flop       2 R K P. Limits: K < 2^31; C <= 512; |k| is 0, or between 2^-60 and 2^60.
#include "../tiles/sm90.cuh"
#include "best_two.cuh"

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
        Turn<Tile::kStages> turn;
        mbarrier_wait(tile.resident_full(), 0);
        auto square = [&](int half) {
            return square_of_row<typename Tile::T, Tile::kPadded>(
                tile.lane % 4, 1, [&](int chunk) { return tile.resident(tile.row(half), 8 * chunk); });
        };
        Comparison best[2] = {Comparison(square(0)), Comparison(square(1))};

        auto start = [&](typename Tile::Scores &s) {
            mbarrier_wait(tile.full(turn.stage), turn.parity);
            wgmma_fence();
            tile.scores(s, tile.stage(turn.stage));
        };
        auto compare = [&](typename Tile::Scores &s, int t) {
            const int first_column = int(run.first_tile + t) * Tile::kColumns + tile.column(0, 0);
#pragma unroll
            for (int half = 0; half < 2; half++) best[half].add(s, half, first_column);
        };
        // Starts tile t + 1 in `next`, then compares tile t meanwhile.
        auto advance = [&](typename Tile::Scores &s, typename Tile::Scores &next, int t) {
            const int stage = turn.stage;
            turn.next();
            start(next);
            wgmma_wait<1>(s);
            tile.release(stage);
            compare(s, t);
        };
        auto finish = [&](typename Tile::Scores &s, int t) {
            wgmma_wait<0>(s);
            mask(tile, s, bank_rows - (run.first_tile + t) * Tile::kColumns);
            compare(s, t);
        };
        typename Tile::Scores even, odd;
        set_zero(even);
        set_zero(odd);
        start(even);
        int t = 0;
        for (; t + 2 < run.tiles; t += 2) {
            advance(even, odd, t);
            advance(odd, even, t + 1);
        }
        if (t + 1 < run.tiles) {
            advance(even, odd, t);
            finish(odd, t + 1);
        } else {
            finish(even, t);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t row = run.first_row + tile.row(half);
            if (row < rows) candidates[(blockIdx.y * rows + row) * kListsPerRow + tile.lane % 4] = best[half].best;
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
