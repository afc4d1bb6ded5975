// The primitives of the sm_80 path on random data: the device against its emulation, from one source. See
// primitives_check.h for how.
#include "primitives_check.h"

namespace {

template <class T>
__global__ void mma_kernel(const uint32_t *in, uint32_t *out) {  // a warp per block; in: a, b, d of each lane
    const int lane = threadIdx.x;
    const uint32_t *mine = in + (blockIdx.x * 32 + lane) * 10;
    const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};
    float d[4];
    memcpy(d, mine + 6, 16);
    caco::mma_m16n8k16<T>(d, a, mine[4], mine[5]);
    memcpy(out + (blockIdx.x * 32 + lane) * 4, d, 16);
}

// |d| + |a| |b| of every output, as large as the sum of what is added can get.
template <class T>
void check_mma(const char *type) {
    constexpr int kBlocks = 256;
    const bool half = std::is_same_v<T, fp16>;
    const std::vector<float> values = random_floats(kBlocks * 32 * 16, 3, 10);
    Words input(kBlocks * 32 * 10), magnitudes(kBlocks * 32 * 10);
    auto rounded = [&](float value) -> uint32_t {  // towards zero, to what both types hold
        const uint32_t bits = std::bit_cast<uint32_t>(value) & (half ? 0xFFFFE000u : 0xFFFF0000u);
        if (!half) return bits >> 16;
        const int exponent = int(bits >> 23 & 0xFF) - 112;
        return exponent <= 0 ? 0 : (bits >> 16 & 0x8000) | uint32_t(exponent) << 10 | (bits >> 13 & 0x3FF);
    };
    for (size_t lane = 0; lane < size_t(kBlocks) * 32; lane++) {
        const float *mine = values.data() + lane * 16;
        for (int r = 0; r < 6; r++) input[lane * 10 + r] = rounded(mine[2 * r]) | rounded(mine[2 * r + 1]) << 16;
        for (int e = 0; e < 4; e++) input[lane * 10 + 6 + e] = std::bit_cast<uint32_t>(mine[12 + e]);
        for (int r = 0; r < 6; r++) magnitudes[lane * 10 + r] = input[lane * 10 + r] & 0x7FFF7FFFu;
        for (int e = 0; e < 4; e++) magnitudes[lane * 10 + 6 + e] = input[lane * 10 + 6 + e] & 0x7FFFFFFFu;
    }
    Check check{std::string("mma_m16n8k16 ") + type,
                true,
                run("mma", mma_kernel<T>, kBlocks, 32, 0, input, kBlocks * 32 * 4),
                {}};
    // Products are exact, sums in f32 in any order and with bits cut off: 17 terms, each cut at an ulp or two of the largest.
    for (uint32_t word : run("mma", mma_kernel<T>, kBlocks, 32, 0, magnitudes, kBlocks * 32 * 4))
        check.allowed.push_back(std::bit_cast<float>(word) * 0x1p-18f);
    checks.push_back(check);
}

// 64 rows of 16 bytes by cp.async, some of them filled with zeros, then four matrices from rows chosen at random.
template <bool kTranspose>
__global__ void ldmatrix_kernel(const uint32_t *in, uint32_t *out) {
    const int lane = threadIdx.x;
    const uint32_t *mine = in + blockIdx.x * (32 + 256);  // 32 choices of a row, then the rows
    char *memory = caco::shared_memory();
    for (int i = 0; i < 2; i++) {
        const int row = lane + 32 * i;
        caco::copy_async_16(memory + 16 * row, mine + 32 + 4 * row, row % 5 != 3);
    }
    caco::copy_async_commit();
    caco::copy_async_wait<0>();
    __syncthreads();
    uint32_t registers[4];
    caco::ldmatrix_x4<kTranspose>(registers, memory + 16 * (mine[lane] % 64));
    for (int m = 0; m < 4; m++) out[(blockIdx.x * 32 + lane) * 4 + m] = registers[m];
}

template <bool kTranspose>
void check_ldmatrix(const char *name) {
    constexpr int kBlocks = 128;
    const Words input = random_words(kBlocks * 288, 4);
    checks.push_back(
        {name, false, run("ldmatrix", ldmatrix_kernel<kTranspose>, kBlocks, 32, 1024, input, kBlocks * 128), {}});
}

// Two groups of copies: after wait<1> the first has landed, after wait<0> both; invalid ones are zeros.
__global__ void copy_kernel(const uint32_t *in, uint32_t *out) {
    const int threads = blockDim.x, thread = threadIdx.x;
    const uint32_t *mine = in + blockIdx.x * threads * 8;
    uint32_t *memory = reinterpret_cast<uint32_t *>(caco::shared_memory());
    for (int group = 0; group < 2; group++) {
        const int place = group * threads + thread;
        caco::copy_async_16(memory + 4 * place, mine + 4 * place, (thread + group) % 7 != 0);
        caco::copy_async_commit();
    }
    uint32_t *result = out + blockIdx.x * (threads * 8 + 1);
    caco::copy_async_wait<1>();
    for (int i = 0; i < 4; i++) result[4 * thread + i] = memory[4 * thread + i];  // by the thread that copied it
    caco::copy_async_wait<0>();
    __syncthreads();
    const int other = threads + (thread + 37) % threads;
    for (int i = 0; i < 4; i++) result[4 * (threads + thread) + i] = memory[4 * other + i];
    if (thread != 0) return;
#ifdef CACO_EMULATE
    result[8 * threads] = reinterpret_cast<uintptr_t>(memory) % 1024;
#else
    result[8 * threads] = __cvta_generic_to_shared(memory) % 1024;
#endif
}

void check_copy() {
    constexpr int kBlocks = 64, kThreads = 128;
    const Words input = random_words(kBlocks * kThreads * 8, 5);
    checks.push_back({"cp.async: copy, zero fill, groups, alignment",
                      false,
                      run("copy", copy_kernel, kBlocks, kThreads, kThreads * 32, input, kBlocks * (kThreads * 8 + 1)),
                      {}});
}

}  // namespace

void run_all() {
    check_common();
    check_copy();
    check_ldmatrix<false>("ldmatrix.x4");
    check_ldmatrix<true>("ldmatrix.x4.trans");
    check_mma<bf16>("bf16");
    check_mma<fp16>("fp16");
}
