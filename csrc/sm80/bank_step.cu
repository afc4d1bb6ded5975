#include "../step_kernel.cuh"
#include "tile.cuh"

namespace caco {

template <>
SharedBytes Kernels<Path::kSm80>::shared_bytes(int channels) {
    SharedBytes bytes{};
    for_padded_channels(channels, [&](auto padded) { bytes = tile_bytes<sm80::Tile<bf16, padded()>>(); });
    return bytes;
}

template <>
void Kernels<Path::kSm80>::bank_step(const StepParams &params, const Target &target) {
    step_row_terms(params, target);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        launch_step<sm80::Tile<decltype(operand), padded()>>(params, target);
    });
}

}  // namespace caco
