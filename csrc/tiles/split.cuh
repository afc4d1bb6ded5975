// How the bank is split over thread blocks.
#pragma once
#include <algorithm>

#include "rows.cuh"

namespace caco {

// The bank cut into `splits` runs of `tiles` column tiles each; every run has at least one tile.
struct Split {
    int splits, tiles;
};

inline Split split_bank(int64_t rows, int64_t bank_rows, int tile_rows, int tile_columns, int multiprocessors) {
    constexpr int64_t kMaxSplits = 64, kMinTiles = 4;
    const int64_t row_tiles = ceil_div(rows, tile_rows), bank_tiles = ceil_div(bank_rows, tile_columns);
    const int64_t most = std::clamp<int64_t>(bank_tiles / kMinTiles, 1, kMaxSplits);
    // The fewest splits that fill the multiprocessors' waves to within 5 % of the best.
    auto filled = [&](int64_t splits) {
        const int64_t blocks = row_tiles * splits;
        return double(blocks) / double(ceil_div(blocks, multiprocessors) * multiprocessors);
    };
    double best = 0;
    for (int64_t splits = 1; splits <= most; splits++) best = std::max(best, filled(splits));
    int64_t splits = 1;
    while (filled(splits) < 0.95 * best) splits++;
    const int64_t tiles = ceil_div(bank_tiles, splits);
    return {static_cast<int>(ceil_div(bank_tiles, tiles)), static_cast<int>(tiles)};
}

}  // namespace caco
