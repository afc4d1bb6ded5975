#include "../step_kernel.cuh"
#include "tile.cuh"

namespace caco::sm80 {

SharedBytes shared_bytes(int channels) {
    SharedBytes bytes{};
    for_padded_channels(channels, [&](auto padded) { bytes = tile_bytes<Tile<bf16, padded()>>(); });
    return bytes;
}

void bank_step(const StepParams &params, const Target &target) {
    step_row_terms(params, target);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        launch_step<Tile<decltype(operand), padded()>>(params, target);
    });
}

}  // namespace caco::sm80
