// A small kernel with one bug of choice, to show that the emulation or a sanitizer catches it.
//
//     planted BUG [seed [greedy [lazy copies]]]
//
// The kernel sums the columns of tiles that stream through shared memory in two stages. Prints "ok" and the number of
// bank conflicts, "wrong", or the emulator's error; a sanitizer speaks for itself.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tiles/primitives.cuh"

namespace {

constexpr int kThreads = 64, kTileRows = 16, kColumns = 64, kTiles = 5, kBlocks = 4;

struct Arguments {
    std::string bug;
    const uint16_t *source;  // [kTiles * kTileRows, kColumns]
    float *sums;             // [kColumns]
    float *total;            // [1], over all blocks
};

int stage_offset(const Arguments &a, int row, int chunk) {
    return row * kColumns + (a.bug == "missing swizzle" ? chunk : chunk ^ (row % 8)) * 8;
}

void load(const Arguments &a, uint16_t *stage, int tile) {
    for (int i = threadIdx.x; i < kTileRows * kColumns / 8; i += kThreads) {
        const int row = i / (kColumns / 8), chunk = i % (kColumns / 8);
        int64_t from = (int64_t(tile) * kTileRows + row) * kColumns + 8 * chunk;
        if (a.bug == "wrong stride") from = (int64_t(tile) * kTileRows + row) * (kColumns - 4) + 8 * chunk;
        if (a.bug == "global out of bounds" && tile == kTiles - 1) from += 8;
        caco::copy_async_16(stage + stage_offset(a, row, chunk), a.source + from, true);
    }
    caco::copy_async_commit();
}

void kernel(const Arguments &a) {
    auto *stages = reinterpret_cast<uint16_t *>(caco::shared_memory());
    auto stage = [&](int tile) {
        return stages + (a.bug == "one stage for two" ? 0 : tile % 2) * kTileRows * kColumns;
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum[4][2] = {};  // of columns 32 warp + 8 matrix + 2 (lane % 4) + {0, 1}, over rows lane / 4 and lane / 4 + 8
    load(a, stage(0), 0);
    for (int tile = 0; tile < kTiles; tile++) {
        if (a.bug != "missing wait") caco::copy_async_wait<0>();
        if (a.bug != "missing barrier") __syncthreads();
        if (tile + 1 < kTiles) load(a, stage(tile + 1), tile + 1);
        for (int half = 0; half < 2; half++) {
            uint32_t registers[4];
            const int row = 8 * half + lane % 8;
            const uint16_t *address = stage(tile) + stage_offset(a, row, 4 * warp + lane / 8);
            if (a.bug == "shared out of bounds" && tile == 1) address += kTileRows * kColumns;
            if (a.bug == "misaligned ldmatrix") address += 1;
            caco::ldmatrix_x4<false>(registers, address);
            for (int m = 0; m < 4; m++) {
                for (int e = 0; e < 2; e++) sum[m][e] += emu::bfloat16_to_float(registers[m] >> (16 * e) & 0xFFFF);
            }
        }
    }
    for (auto &pair : sum) {
        for (float &value : pair) {
            for (int bits = 4; bits < 32; bits *= 2) {
                if (a.bug == "diverged shuffle" && lane == 3) continue;
                if (a.bug == "shuffle meets vote" && lane == 3) __ballot_sync(caco::kFullWarp, 1);
                value += __shfl_xor_sync(caco::kFullWarp, value, bits);
            }
        }
    }
    if (a.bug == "barrier in a branch" && warp == 0) __syncthreads();
    if (blockIdx.x == 0 && lane < 4) {
        for (int m = 0; m < 4; m++) {
            for (int e = 0; e < 2; e++) a.sums[32 * warp + 8 * m + 2 * lane + e] = sum[m][e];
        }
    }
    if (lane == 0) {
        if (a.bug == "update without atomics") *a.total += sum[0][0];
        else atomicAdd(a.total, sum[0][0]);
    }
}

}  // namespace

int main(int argc, char **argv) {
    auto option = [&](int at, int otherwise) { return at < argc ? std::atoi(argv[at]) : otherwise; };
    emu::schedule = {unsigned(option(2, 0)), option(3, 0) != 0, option(4, 1) != 0, 2};
    std::vector<uint16_t> source;
    std::vector<float> expected(kColumns), sums(kColumns, NAN), total(1);
    for (int row = 0; row < kTiles * kTileRows; row++) {
        for (int column = 0; column < kColumns; column++) {
            const float value = float((row * 7 + column * 3) % 11);
            source.push_back(emu::float_to_bfloat16(value));
            expected[column] += value;
        }
    }
    source.shrink_to_fit();
    const Arguments arguments{argc > 1 ? argv[1] : "none", source.data(), sums.data(), total.data()};
    try {
        const int shared_bytes = 2 * kTileRows * kColumns * 2;
        caco::launch("planted", kernel, dim3(kBlocks), kThreads, shared_bytes, nullptr, arguments);
    } catch (const std::exception &error) {
        std::printf("error: %s\n", error.what());
        return 1;
    }
    const bool good = sums == expected && total[0] == kBlocks * (expected[0] + expected[32]);
    std::printf("%s, %ld conflicts\n", good ? "ok" : "wrong", emu::counters.bank_conflicts.load());
    return good ? 0 : 1;
}
