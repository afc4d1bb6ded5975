// Hopper's own primitives (csrc/tiles/primitives_sm90.cuh) on random data: the device against its emulation, from one source.
// See primitives_check.h for how.
//
// One block: TMA copies rows of A and B into swizzled slabs, some rows beyond the end, and a plain bulk copy weights W; an
// mbarrier waits for all. Threads store A once more next to it, for products. Then
//   S [64, n] = A B^T     wgmma of shared memory, over all channels, in turn from the one A and the other
//   O [64, P] = W B       wgmma of registers, over all n rows
// Everything is written out: the slabs as they lie in shared memory, S and O.
#include "primitives_check.h"
#include "tiles/primitives_sm90.cuh"

namespace {

constexpr int kRows = 64, kFirstRow = 3;

template <class T_, int kColumns_, int kChannels_>
struct Shape {
    using T = T_;
    static constexpr int kColumns = kColumns_, kChannels = kChannels_;
    static constexpr int kSlabs = kChannels / caco::kSlabChannels;
    static constexpr int kSlabBytesA = kRows * caco::kSlabRowBytes, kSlabBytesB = kColumns * caco::kSlabRowBytes;
    static constexpr int kBytesA = kSlabs * kSlabBytesA, kBytesB = kSlabs * kSlabBytesB;
    // A and B as TMA brings them, A once more as threads store it, weights W, a barrier.
    static constexpr int kCopyAt = kBytesA + kBytesB, kWeightsAt = kCopyAt + kBytesA;
    static constexpr int kWeightBytes = kColumns / 16 * 4 * caco::kWarpgroupThreads * 4;
    static constexpr int kBarrierAt = kWeightsAt + kWeightBytes, kSharedBytes = kBarrierAt + 16;
    // Rows in memory: from kFirstRow on some fewer than a slab holds.
    static constexpr int kRowsA = kFirstRow + kRows - 11, kRowsB = kFirstRow + kColumns - 5;
    static constexpr int kWordsA = kRowsA * kChannels / 2, kWordsB = kRowsB * kChannels / 2;
    static constexpr int kWeights = kColumns / 16 * 4;  // registers of W in a thread
    static constexpr int kWords = kWordsA + kWordsB + kWeights * caco::kWarpgroupThreads;
    static constexpr int kSlabWords = (kBytesA + kBytesB) / 4;
    static constexpr int kProducts = (kColumns + kChannels) / 2;  // of S and O in a thread
    static constexpr int kOutputs = kSlabWords + kProducts * caco::kWarpgroupThreads;
};

template <class Shape>
__global__ void __launch_bounds__(caco::kWarpgroupThreads, 1)
    product_kernel(const __grid_constant__ caco::TensorMap map_a, const __grid_constant__ caco::TensorMap map_b,
                   const uint32_t *weights, uint32_t *out) {
#ifdef CACO_SM90A
    using T = typename Shape::T;
    char *a = caco::shared_memory(), *b = a + Shape::kBytesA;
    auto *copy = reinterpret_cast<uint32_t *>(a + Shape::kCopyAt);
    auto *barrier = reinterpret_cast<caco::Mbarrier *>(a + Shape::kBarrierAt);
    const int thread = threadIdx.x;
    if (thread == 0) {
        caco::mbarrier_init(barrier, 1);
        caco::mbarrier_init_fence();
    }
    __syncthreads();
    if (thread == 0) {
        caco::mbarrier_arrive_expect(barrier, Shape::kBytesA + Shape::kBytesB + Shape::kWeightBytes);
        caco::bulk_load(a + Shape::kWeightsAt, weights, Shape::kWeightBytes, barrier);
        for (int slab = 0; slab < Shape::kSlabs; slab++) {
            const int channel = slab * caco::kSlabChannels;
            caco::tma_load(a + slab * Shape::kSlabBytesA, &map_a, channel, kFirstRow, barrier);
            caco::tma_load(b + slab * Shape::kSlabBytesB, &map_b, channel, kFirstRow, barrier);
        }
    }
    caco::mbarrier_wait(barrier, 0);
    for (int at = thread; at < Shape::kSlabWords; at += caco::kWarpgroupThreads) {
        out[at] = reinterpret_cast<const uint32_t *>(a)[at];
    }

    for (int at = thread; at < Shape::kBytesA / 4; at += caco::kWarpgroupThreads) {
        caco::store_for_products(copy + at, reinterpret_cast<const uint32_t *>(a)[at]);
    }
    caco::async_proxy_fence();
    caco::named_barrier<1, caco::kWarpgroupThreads>();

    float s[Shape::kColumns / 8][4] = {}, o[Shape::kChannels / 8][4] = {};
    uint32_t w[Shape::kColumns / 16][4];
    const auto *loaded = reinterpret_cast<const uint32_t *>(a + Shape::kWeightsAt);
    for (int k = 0; k < Shape::kColumns / 16; k++) {
        for (int r = 0; r < 4; r++) w[k][r] = loaded[thread * Shape::kWeights + 4 * k + r];
    }
    const caco::Operand rows = caco::swizzled_operand(a, 0), stored = caco::swizzled_operand(copy, 0);
    const caco::Operand keys = caco::swizzled_operand(b, 0);
    const caco::Operand values = caco::swizzled_operand(b, Shape::kSlabBytesB);
    caco::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Shape::kChannels / 16; k++) {
        const int inside = 32 * (k % 4), slab = k / 4;
        caco::wgmma_scores<T>(s, caco::further_by(k % 2 ? stored : rows, slab * Shape::kSlabBytesA + inside),
                              caco::further_by(keys, slab * Shape::kSlabBytesB + inside), k > 0);
    }
    caco::wgmma_commit();
    caco::wgmma_wait<0>(s);
    caco::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Shape::kColumns / 16; k++) {
        caco::wgmma_accumulate<T>(o, w[k], caco::further_by(values, 16 * k * caco::kSlabRowBytes));
    }
    caco::wgmma_commit();
    caco::wgmma_wait<0>(o);
    float *mine = reinterpret_cast<float *>(out) + Shape::kSlabWords + thread * Shape::kProducts;
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; j++) {
        for (int e = 0; e < 4; e++) mine[4 * j + e] = s[j][e];
    }
#pragma unroll
    for (int j = 0; j < Shape::kChannels / 8; j++) {
        for (int e = 0; e < 4; e++) mine[Shape::kColumns / 2 + 4 * j + e] = o[j][e];
    }
#endif
}

template <class Shape>
Words run_product(const Words &input) {
    const Buffer in(input), out(Words(Shape::kOutputs, 0xFFFFFFFFu));
    using Type = caco::OperandType;
    const Type type = std::is_same_v<typename Shape::T, bf16> ? Type::kBfloat16 : Type::kFloat16;
    const uint32_t *b = in.data + Shape::kWordsA;
    caco::launch("product", product_kernel<Shape>, dim3(1), caco::kWarpgroupThreads, Shape::kSharedBytes, nullptr,
                 caco::make_tensor_map(in.data, Shape::kRowsA, Shape::kChannels, type, kRows),
                 caco::make_tensor_map(b, Shape::kRowsB, Shape::kChannels, type, Shape::kColumns),
                 static_cast<const uint32_t *>(b + Shape::kWordsB), out.data);
    return out.words();
}

// Pairs of values of T between 2^-6 and 2 in magnitude, of either sign.
template <class T>
Words random_pairs(size_t count, unsigned seed) {
    Words words = random_words(count, seed);
    for (uint32_t &word : words) {
        uint32_t pair = 0;
        for (int half = 0; half < 2; half++) {
            const uint32_t bits = word >> 16 * half & 0xFFFF, sign = bits & 0x8000, exponent = bits >> 10 & 0x1F;
            const uint32_t value = std::is_same_v<T, bf16> ? sign | (121 + exponent % 7) << 7 | (bits & 0x7F)
                                                           : sign | (9 + exponent % 7) << 10 | (bits & 0x3FF);
            pair |= value << 16 * half;
        }
        word = pair;
    }
    return words;
}

template <class Shape>
void check_product(const char *type) {
    const Words input = random_pairs<typename Shape::T>(Shape::kWords, 7);
    Words magnitudes = input;
    for (uint32_t &word : magnitudes) word &= 0x7FFF7FFFu;
    const std::string name =
        std::string(type) + " n " + std::to_string(Shape::kColumns) + " P " + std::to_string(Shape::kChannels);
    const Words found = run_product<Shape>(input), largest = run_product<Shape>(magnitudes);
    const auto split = found.begin() + Shape::kSlabWords;
    checks.push_back({"TMA, mbarrier, swizzle " + name, false, Words(found.begin(), split), {}});
    Check check{"wgmma " + name, true, Words(split, found.end()), {}};
    // Products are exact; of up to 256 terms each sum is cut at an ulp or two of the largest.
    for (size_t at = Shape::kSlabWords; at < largest.size(); at++) {
        check.allowed.push_back(std::bit_cast<float>(largest[at]) * 0x1p-14f);
    }
    checks.push_back(check);
}

}  // namespace

void run_all() {
    check_common();
    check_product<Shape<bf16, 48, 64>>("bf16");
    check_product<Shape<fp16, 48, 64>>("fp16");
    check_product<Shape<bf16, 96, 128>>("bf16");
    check_product<Shape<fp16, 128, 128>>("fp16");
    check_product<Shape<bf16, 96, 256>>("bf16");
    check_product<Shape<fp16, 48, 256>>("fp16");
}
