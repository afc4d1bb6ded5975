#include "../attend_kernel.cuh"
#include "tile.cuh"

namespace caco {

template <>
Split Kernels<Path::kSm70>::attend_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors) {
    Split split{};
    for_padded_channels(channels, [&](auto padded) {
        using Shape = sm70::Tile<padded()>;
        split = split_bank(rows, bank_rows, Shape::kRows, Shape::kColumns, multiprocessors);
    });
    return split;
}

template <>
void Kernels<Path::kSm70>::bank_attend(const AttendParams &params, const Target &target) {
    const Split split = attend_split(params.rows, params.bank_rows, params.channels, target.multiprocessors);
    for_padded_channels(params.channels, [&](auto padded) {
        launch_attend<sm70::Tile<padded()>>(params, split, target);
    });
    merge_attend(params, split.splits, target);
}

}  // namespace caco
