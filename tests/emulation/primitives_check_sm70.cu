// The primitives of the sm_70 path on random data: the device against its emulation, from one source. See
// primitives_check.h for how. Every later GPU has these instructions, too.
#include "primitives_check.h"

namespace {

// A warp per block; in: a, b, d of each lane.
template <caco::LayoutOfB kLayout>
__global__ void mma_kernel(const uint32_t *in, uint32_t *out) {
    const int lane = threadIdx.x;
    const uint32_t *mine = in + (blockIdx.x * 32 + lane) * 12;
    float d0[4], d1[4];
    memcpy(d0, mine + 4, 16);
    memcpy(d1, mine + 8, 16);
    caco::mma_m8n8k4<kLayout>(d0, d1, mine[0], mine[1], mine[2], mine[3]);
    memcpy(out + (blockIdx.x * 32 + lane) * 8, d0, 16);
    memcpy(out + (blockIdx.x * 32 + lane) * 8 + 4, d1, 16);
}

template <caco::LayoutOfB kLayout>
void check_mma(const char *name) {
    constexpr int kBlocks = 256;
    const std::vector<float> sums = random_floats(kBlocks * 32 * 12, 3, 8);
    Words input = random_words(kBlocks * 32 * 12, 4), magnitudes;
    for (size_t at = 0; at < input.size(); at++) {
        // Halves from 2^-6 to 2, and for d numbers of the same size.
        if (at % 12 < 4) input[at] = (input[at] & 0x9BFF9BFFu) | 0x24002400u;
        else input[at] = std::bit_cast<uint32_t>(sums[at]);
        magnitudes.push_back(input[at] & (at % 12 < 4 ? 0x7FFF7FFFu : 0x7FFFFFFFu));
    }
    Check check{name, true, run("mma", mma_kernel<kLayout>, kBlocks, 32, 0, input, kBlocks * 32 * 8), {}};
    // Products are exact; five terms, each cut at an ulp or two of the largest.
    for (uint32_t word : run("mma", mma_kernel<kLayout>, kBlocks, 32, 0, magnitudes, kBlocks * 32 * 8))
        check.allowed.push_back(std::bit_cast<float>(word) * 0x1p-19f);
    checks.push_back(check);
}

__global__ void load_kernel(const uint32_t *in, uint32_t *out) {
    const int lane = threadIdx.x;
    const uint32_t *mine = in + blockIdx.x * (32 + 256);  // 32 choices of a row, then 64 rows of 16 bytes
    uint32_t *memory = reinterpret_cast<uint32_t *>(caco::shared_memory());
    for (int at = lane; at < 256; at += 32) memory[at] = mine[32 + at];
    __syncthreads();
    uint32_t registers[4];
    caco::load_shared_16(registers, memory + 4 * (mine[lane] % 64));
    for (int i = 0; i < 4; i++) out[(blockIdx.x * 32 + lane) * 4 + i] = registers[i];
}

}  // namespace

void run_all() {
    constexpr int kBlocks = 128;
    check_common();
    check_mma<caco::kColumnsOfB>("mma_m8n8k4, B by columns");
    check_mma<caco::kRowsOfB>("mma_m8n8k4, B by rows");
    checks.push_back({"load_shared_16",
                      false,
                      run("load", load_kernel, kBlocks, 32, 1024, random_words(kBlocks * 288, 6), kBlocks * 128),
                      {}});
}
