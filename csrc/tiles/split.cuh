// How the bank is split over thread blocks.
#pragma once
#include <algorithm>

#include "rows.cuh"

namespace caco {

// The bank cut into `splits` runs of `tiles` column tiles each; every run has at least one tile.
struct Split {
    int splits, tiles;
};

constexpr int64_t kMaxSplits = 64;

// A block takes as long as its tiles, and the multiprocessors run the blocks in waves. The fewest splits that are within
// 5 % of the shortest: each split more is partial results to write and to merge.
inline Split split_bank(int64_t rows, int64_t bank_rows, int tile_rows, int tile_columns, int multiprocessors) {
    constexpr int64_t kMinTiles = 4;
    const int64_t row_tiles = ceil_div(rows, tile_rows), bank_tiles = ceil_div(bank_rows, tile_columns);
    const int64_t most = std::clamp<int64_t>(bank_tiles / kMinTiles, 1, kMaxSplits);
    // In tiles one after another, for runs of that many.
    auto length = [&](int64_t tiles) {
        return ceil_div(row_tiles * ceil_div(bank_tiles, tiles), multiprocessors) * tiles;
    };
    int64_t shortest = length(bank_tiles);
    for (int64_t splits = 2; splits <= most; splits++) {
        shortest = std::min(shortest, length(ceil_div(bank_tiles, splits)));
    }
    int64_t splits = 1;
    while (100 * length(ceil_div(bank_tiles, splits)) > 105 * shortest) splits++;
    const int64_t tiles = ceil_div(bank_tiles, splits);
    return {static_cast<int>(ceil_div(bank_tiles, tiles)), static_cast<int>(tiles)};
}

}  // namespace caco
