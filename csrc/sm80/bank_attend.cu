#include "../attend_kernel.cuh"
#include "tile.cuh"

namespace caco {

template <>
Split Kernels<Path::kSm80>::attend_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors) {
    Split split{};
    for_padded_channels(channels, [&](auto padded) {
        using Shape = sm80::Tile<bf16, padded()>;
        split = split_bank(rows, bank_rows, Shape::kRows, Shape::kColumns, multiprocessors);
    });
    return split;
}

template <>
void Kernels<Path::kSm80>::bank_attend(const AttendParams &params, const Target &target) {
    const Split split = attend_split(params.rows, params.bank_rows, params.channels, target.multiprocessors);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        launch_attend<sm80::Tile<decltype(operand), padded()>>(params, split, target);
    });
    merge_attend(params, split.splits, target);
}

}  // namespace caco
