// bank_step on the tiles of sm_70 and of sm_80: the kernel of tiles.cuh over the instructions of each.
#include "../tiles/sm70.cuh"
#include "../tiles/sm80.cuh"
#include "tiles.cuh"

namespace caco {

template <>
int BankStep<Path::kSm70>::shared_bytes(int channels) {
    int bytes = 0;
    for_padded_channels(channels, [&](auto padded) { bytes = StepShape<sm70::Tile<padded()>>::kSharedBytes; });
    return bytes;
}

template <>
void BankStep<Path::kSm70>::enqueue(const StepParams &params, const Target &target) {
    step_row_terms(params, target);
    for_padded_channels(params.channels, [&](auto padded) { launch_step<sm70::Tile<padded()>>(params, target); });
}

template <>
int BankStep<Path::kSm80>::shared_bytes(int channels) {
    int bytes = 0;
    for_padded_channels(channels, [&](auto padded) { bytes = StepShape<sm80::Tile<bf16, padded()>>::kSharedBytes; });
    return bytes;
}

template <>
void BankStep<Path::kSm80>::enqueue(const StepParams &params, const Target &target) {
    step_row_terms(params, target);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        launch_step<sm80::Tile<decltype(operand), padded()>>(params, target);
    });
}

}  // namespace caco
