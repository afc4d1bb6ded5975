// bank_select on the tiles of sm_70 and of sm_80: the kernel of tiles.cuh over the instructions of each.
#include "../tiles/sm70.cuh"
#include "../tiles/sm80.cuh"
#include "tiles.cuh"

namespace caco {

template <>
Split BankSelect<Path::kSm70>::split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors) {
    Split split{};
    for_padded_channels(channels, [&](auto padded) {
        using Shape = sm70::Tile<padded()>;
        split = split_bank(rows, bank_rows, Shape::kRows, Shape::kColumns, multiprocessors);
    });
    return split;
}

template <>
int BankSelect<Path::kSm70>::shared_bytes(int channels) {
    int bytes = 0;
    for_padded_channels(channels, [&](auto padded) { bytes = sm70::Tile<padded()>::kTileBytes; });
    return bytes;
}

template <>
void BankSelect<Path::kSm70>::enqueue(const SelectParams &params, const Target &target) {
    const Split split = BankSelect::split(params.rows, params.bank_rows, params.channels, target.multiprocessors);
    for_padded_channels(params.channels,
                        [&](auto padded) { launch_select<sm70::Tile<padded()>>(params, split, target); });
    settle_select(params, split.splits, target);
}

template <>
Split BankSelect<Path::kSm80>::split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors) {
    Split split{};
    for_padded_channels(channels, [&](auto padded) {
        using Shape = sm80::Tile<bf16, padded()>;
        split = split_bank(rows, bank_rows, Shape::kRows, Shape::kColumns, multiprocessors);
    });
    return split;
}

template <>
int BankSelect<Path::kSm80>::shared_bytes(int channels) {
    int bytes = 0;
    for_padded_channels(channels, [&](auto padded) { bytes = sm80::Tile<bf16, padded()>::kTileBytes; });
    return bytes;
}

template <>
void BankSelect<Path::kSm80>::enqueue(const SelectParams &params, const Target &target) {
    const Split split = BankSelect::split(params.rows, params.bank_rows, params.channels, target.multiprocessors);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        launch_select<sm80::Tile<decltype(operand), padded()>>(params, split, target);
    });
    settle_select(params, split.splits, target);
}

}  // namespace caco
