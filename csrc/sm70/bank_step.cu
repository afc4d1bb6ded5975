#include "../step_kernel.cuh"
#include "tile.cuh"

namespace caco::sm70 {

SharedBytes shared_bytes(int channels) {
    SharedBytes bytes{};
    for_padded_channels(channels, [&](auto padded) { bytes = tile_bytes<Tile<padded()>>(); });
    return bytes;
}

void bank_step(const StepParams &params, const Target &target) {
    step_row_terms(params, target);
    for_padded_channels(params.channels, [&](auto padded) {
        launch_step<Tile<padded()>>(params, target);
    });
}

}  // namespace caco::sm70
