// A small kernel on Hopper's asynchronous units with one bug of choice, to show that the emulation catches it.
//
//     planted_sm90 BUG [seed [greedy [lazy copies]]]
//
// O = sum over tiles (Q W^T diag(f)) W, where the tiles of W and of factors f stream through shared memory in two
// stages: one thread copies, a warpgroup stores Q for the products and multiplies. Prints "ok" and the number of bank
// conflicts, "wrong", or the emulator's error.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tiles/primitives_sm90.cuh"

namespace {

using caco::bf16;

constexpr int kRows = 64, kColumns = 64, kChannels = 64, kTiles = 5, kStages = 2, kBlocks = 2;
constexpr int kSlabBytes = kColumns * caco::kSlabRowBytes;
constexpr int kFactorBytes = kColumns * 4;
// Q, stages of W, barriers, stages of f
constexpr int kBarriersAt = kSlabBytes * (1 + kStages), kFactorsAt = kBarriersAt + 128;
constexpr int kSharedBytes = kFactorsAt + kFactorBytes * kStages;

struct Arguments {
    std::string bug;
    const uint16_t *queries;  // [kRows, kChannels]
    caco::TensorMap bank;
    const float *factors;  // [kTiles * kColumns]
    float *sums;           // [kRows, kChannels]
};

// The queries for products, each thread half a row, its chunks swizzled.
void store_queries(const Arguments &a, uint16_t *rows) {
    const int thread = threadIdx.x, row = thread / 2;
    for (int channel = thread % 2 * 32; channel < (thread % 2 + 1) * 32; channel++) {
        uint16_t *to = rows + row * kChannels + (channel / 8 ^ row % 8) * 8 + channel % 8;
        const uint16_t value = a.queries[row * kChannels + channel];
        if (a.bug == "plain stores") *to = value;
        else caco::store_for_products(to, value);
    }
}

void kernel(const Arguments &a) {
    auto bug = [&](const char *name) { return a.bug == name; };
    char *memory = caco::shared_memory();
    auto *full = reinterpret_cast<caco::Mbarrier *>(memory + kBarriersAt), *empty = full + kStages;
    auto factors = [&](int t) { return reinterpret_cast<float *>(memory + kFactorsAt) + t % kStages * kColumns; };
    auto stage = [&](int t) { return memory + kSlabBytes * (1 + t % kStages); };
    if (threadIdx.x == 0) {
        for (int at = 0; at < kStages; at++) {
            if (!(bug("uninitialised mbarrier") && at == 1)) caco::mbarrier_init(full + at, 1);
            caco::mbarrier_init(empty + at, 4);
        }
        caco::mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= caco::kWarpgroupThreads) {
        if (threadIdx.x != caco::kWarpgroupThreads) return;
        const int rest = bug("prefetch beyond the end") ? 16 : 0, misplaced = bug("misaligned prefetch") ? 1 : 0;
        caco::bulk_prefetch(a.factors + misplaced, kTiles * kFactorBytes + rest);
        for (int t = 0; t < kTiles; t++) {
            if (!bug("missing wait for empty")) caco::mbarrier_wait(empty + t % kStages, (t / kStages & 1) ^ 1);
            const int bytes = kSlabBytes + kFactorBytes + (bug("too many bytes") ? 16 : bug("too few bytes") ? -16 : 0);
            caco::mbarrier_arrive_expect(full + t % kStages, bytes);
            char *to = stage(t) + (bug("misaligned destination") ? 128 : 0);
            caco::tma_load(to, &a.bank, 0, t * kColumns, full + t % kStages);
            const float *from = a.factors + t * kColumns + (bug("misaligned source") ? 1 : 0);
            caco::bulk_load(factors(t), from, kFactorBytes, full + t % kStages);
        }
        return;
    }
    float s[kColumns / 8][4] = {}, o[kChannels / 8][4] = {};
    uint32_t weights[kColumns / 16][4];
    if (bug("proxy fence before the stores")) caco::async_proxy_fence();
    store_queries(a, reinterpret_cast<uint16_t *>(memory));
    const bool fences = !bug("missing proxy fence") && !bug("proxy fence before the stores");
    if (fences && (threadIdx.x == 0 || !bug("proxy fence by one thread"))) caco::async_proxy_fence();
    if (bug("wrong number at the barrier") && threadIdx.x < 64) caco::named_barrier<1, 64>();
    else if (!bug("missing barrier")) caco::named_barrier<1, caco::kWarpgroupThreads>();
    for (int t = 0; t < kTiles; t++) {
        const unsigned parity = bug("wrong parity") ? t & 1 : t / kStages & 1;
        if (!bug("missing wait for full")) caco::mbarrier_wait(full + t % kStages, parity);
        if (!bug("missing fence")) caco::wgmma_fence();
        if (bug("diverged warpgroup") && threadIdx.x / 32 == 2) continue;
        const caco::Operand rows = caco::swizzled_operand(memory, 0), streamed = caco::swizzled_operand(stage(t), 0);
        for (int k = 0; k < kChannels / 16; k++) {
            const int bytes = 32 * k + (bug("operand beyond its slab") && k == 3 ? kSharedBytes : 0);
            caco::wgmma_scores<bf16>(s, caco::further_by(rows, 32 * k), caco::further_by(streamed, bytes), k > 0);
        }
        if (!bug("missing commit")) caco::wgmma_commit();
        if (!bug("missing wait for products")) caco::wgmma_wait<0>(s);
        for (int n = 0; n < kColumns / 8; n++) {
            for (int e = 0; e < 4; e++) s[n][e] *= factors(t)[8 * n + threadIdx.x % 4 * 2 + e % 2];
        }
        for (int k = 0; k < kColumns / 16; k++) {
            for (int r = 0; r < 4; r++) {
                weights[k][r] = caco::pack<bf16>(s[2 * k + r / 2][r % 2 * 2], s[2 * k + r / 2][r % 2 * 2 + 1]);
            }
        }
        caco::wgmma_fence();
        for (int k = 0; k < kColumns / 16; k++) {
            caco::wgmma_accumulate<bf16>(o, weights[k], caco::further_by(streamed, 16 * k * caco::kSlabRowBytes));
        }
        caco::wgmma_commit();
        if (bug("weights written too early")) weights[1][2] = 0;
        if (bug("operand overwritten too early")) stage(t)[threadIdx.x] = 1;
        if (bug("released too early") && threadIdx.x % 32 == 0) caco::mbarrier_arrive(empty + t % kStages);
        caco::wgmma_wait<0>(o);
        caco::async_proxy_fence();
        __syncwarp();
        if (!bug("released too early") && threadIdx.x % 32 == 0) caco::mbarrier_arrive(empty + t % kStages);
    }
    if (blockIdx.x != 0) return;
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    for (int n = 0; n < kChannels / 8; n++) {
        for (int e = 0; e < 4; e++) {
            a.sums[(row + e / 2 * 8) * kChannels + 8 * n + threadIdx.x % 4 * 2 + e % 2] = o[n][e];
        }
    }
}

}  // namespace

int main(int argc, char **argv) {
    auto option = [&](int at, int otherwise) { return at < argc ? std::atoi(argv[at]) : otherwise; };
    emu::schedule = {unsigned(option(2, 0)), option(3, 0) != 0, option(4, 1) != 0, 2};
    const std::string bug = argc > 1 ? argv[1] : "none";
    // A query has one channel that is not zero, so every score is a small integer and all is exact in bf16.
    std::vector<uint16_t> queries(kRows * kChannels), bank;
    std::vector<float> expected(kRows * kChannels), sums(kRows * kChannels, NAN), factors;
    auto channel = [](int row) { return row * 5 % kChannels; };
    auto value = [](int column, int c) { return float((column * 7 + c * 3) % 11); };
    for (int row = 0; row < kRows; row++) queries[row * kChannels + channel(row)] = emu::float_to_bfloat16(2);
    for (int column = 0; column < kTiles * kColumns; column++) {
        factors.push_back(float(1 + column % 3));
        for (int c = 0; c < kChannels; c++) {
            bank.push_back(emu::float_to_bfloat16(value(column, c)));
            for (int row = 0; row < kRows; row++) {
                expected[row * kChannels + c] += 2 * factors[column] * value(column, channel(row)) * value(column, c);
            }
        }
    }
    factors.shrink_to_fit();
    const caco::TensorMap map =
        caco::make_tensor_map(bank.data(), kTiles * kColumns, kChannels, caco::OperandType::kBfloat16, kColumns);
    Arguments arguments{bug, queries.data(), map, factors.data(), sums.data()};
    if (bug == "missing swizzle") arguments.bank.swizzled = false;
    if (bug == "wrong box") arguments.bank.box_rows = kColumns / 2;
    try {
        caco::launch("planted", kernel, dim3(kBlocks), 2 * caco::kWarpgroupThreads, kSharedBytes, nullptr, arguments);
    } catch (const std::exception &error) {
        std::printf("error: %s\n", error.what());
        return 1;
    }
    const bool good = sums == expected;
    std::printf("%s, %ld conflicts\n", good ? "ok" : "wrong", emu::counters.bank_conflicts.load());
    return good ? 0 : 1;
}
