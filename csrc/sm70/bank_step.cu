#include "../step_kernel.cuh"
#include "tile.cuh"

namespace caco {

template <>
SharedBytes Kernels<Path::kSm70>::shared_bytes(int channels) {
    SharedBytes bytes{};
    for_padded_channels(channels, [&](auto padded) { bytes = tile_bytes<sm70::Tile<padded()>>(); });
    return bytes;
}

template <>
void Kernels<Path::kSm70>::bank_step(const StepParams &params, const Target &target) {
    step_row_terms(params, target);
    for_padded_channels(params.channels, [&](auto padded) {
        launch_step<sm70::Tile<padded()>>(params, target);
    });
}

}  // namespace caco
