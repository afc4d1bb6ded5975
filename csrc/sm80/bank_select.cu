#include "../select_kernel.cuh"
#include "tile.cuh"

namespace caco {

template <>
Split Kernels<Path::kSm80>::select_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors) {
    return attend_split(rows, bank_rows, channels, multiprocessors);  // the same tiles
}

template <>
void Kernels<Path::kSm80>::bank_select(const SelectParams &params, const Target &target) {
    const Split split = select_split(params.rows, params.bank_rows, params.channels, target.multiprocessors);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        launch_select<sm80::Tile<decltype(operand), padded()>>(params, split, target);
    });
    settle_select(params, split.splits, target);
}

}  // namespace caco
