// Each primitive of csrc/primitives.cuh on random data: the device against its emulation, from one source.
//
//     primitives_check FILE            runs all checks, writes their results
//     primitives_check FILE compare    runs them again and compares with FILE, written by the other build
//
// Built by g++ with CACO_EMULATE the program runs on the CPU, built by nvcc on the GPU: the emulated one writes, the
// other compares. A value passes if it is off by at most what `allowed` says, 0 for primitives that move or round
// bits; NaN equals NaN. Prints a line per check and returns 0, 1 (a difference) or 2 (it could not run). To add a
// primitive: a kernel, and a check that appends to `checks`.
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "primitives.cuh"
#include "rows.cuh"

namespace {

using caco::bf16;
using caco::fp16;
using Words = std::vector<uint32_t>;

struct Check {
    std::string name;
    bool as_float;          // else compared bit by bit
    Words found;
    std::vector<float> allowed;  // one per word, or none: 0
};
std::vector<Check> checks;

// Memory that kernels can reach, with a copy of `words`.
class Buffer {
   public:
    explicit Buffer(const Words &words) : count_(words.size()) {
#ifdef CACO_EMULATE
        if (posix_memalign(reinterpret_cast<void **>(&data), 256, 4 * count_)) throw std::bad_alloc();
        std::memcpy(data, words.data(), 4 * count_);
    }
    ~Buffer() { std::free(data); }
    Words words() const { return Words(data, data + count_); }
#else
        must(cudaMalloc(&data, 4 * count_));
        must(cudaMemcpy(data, words.data(), 4 * count_, cudaMemcpyHostToDevice));
    }
    ~Buffer() { cudaFree(data); }
    Words words() const {
        Words result(count_);
        must(cudaMemcpy(result.data(), data, 4 * count_, cudaMemcpyDeviceToHost));  // waits for the kernels
        return result;
    }
    static void must(cudaError_t status) {
        if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
    }
#endif
    Buffer(const Buffer &) = delete;
    uint32_t *data = nullptr;

   private:
    size_t count_;
};

Words random_words(size_t count, unsigned seed) {
    std::mt19937 random(seed);
    Words words(count);
    for (uint32_t &word : words) word = random();
    return words;
}

// Uniform in [-1, 1), times 2^e with e in [-spread, 0]: the same numbers from every compiler.
std::vector<float> random_floats(size_t count, unsigned seed, int spread) {
    std::mt19937 random(seed);
    std::vector<float> values(count);
    for (float &value : values) {
        value = static_cast<float>(int32_t(random()) >> 8) * 0x1p-23f;
        value = std::ldexp(value, -int(random() % (spread + 1)));
    }
    return values;
}

Words bits_of(const std::vector<float> &values) {
    Words words(values.size());
    std::memcpy(words.data(), values.data(), 4 * values.size());
    return words;
}

// `kernel` reads `input` and writes `outputs` words, filled with NaN before.
template <class Kernel>
Words run(const char *name, Kernel kernel, int blocks, int threads, int shared_bytes, const Words &input,
          size_t outputs) {
    const Buffer in(input), out(Words(outputs, 0xFFFFFFFFu));
    caco::launch(name, kernel, dim3(blocks), threads, shared_bytes, nullptr, static_cast<const uint32_t *>(in.data),
                 out.data);
    return out.words();
}

// Rounding: all edge cases of f32 by its upper bits, and random ones.
template <class T>
__global__ void rounding_kernel(const uint32_t *in, uint32_t *out) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    const float *values = reinterpret_cast<const float *>(in);
    out[2 * at] = caco::pack<T>(values[2 * at], values[2 * at + 1]);
    const T one = caco::from_float<T>(values[2 * at]);
    uint16_t bits;
    memcpy(&bits, &one, 2);
    out[2 * at + 1] = bits;
}

template <class T>
void check_rounding(const char *type) {
    constexpr int kThreads = 128, kBlocks = 2048;
    Words input = random_words(2 * kThreads * kBlocks, 1);
    for (size_t i = 0; i < 65536; i++) {  // every exponent, with mantissas at, just above and just below a tie
        const uint32_t tails[4] = {0, 0x8000, 0x8001, 0x7FFF};
        input[i] = uint32_t(i) << 16 | tails[i / 7 % 4];
        if (i % 3 == 0) input[65536 + i] = (0x33000000u + uint32_t(i) * 0x1000u);  // halves: subnormal to overflow
    }
    for (uint32_t &word : input) {  // a NaN's payload is nobody's business
        if ((word & 0x7FFFFFFF) > 0x7F800000) word = 0x7FC00000;
    }
    checks.push_back({std::string("pack and from_float ") + type, false,
                      run("rounding", rounding_kernel<T>, kBlocks, kThreads, 0, input, input.size()), {}});
}

__global__ void exp2_kernel(const uint32_t *in, uint32_t *out) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    reinterpret_cast<float *>(out)[at] = caco::fast_exp2(reinterpret_cast<const float *>(in)[at]);
}

void check_exp2() {
    constexpr int kThreads = 128, kBlocks = 512;
    std::vector<float> x = random_floats(kThreads * kBlocks, 2, 12);
    for (size_t i = 0; i < x.size(); i++) x[i] *= i % 2 ? 150.f : 20.f;
    const float edges[] = {0.f, -0.f, 1.f, -1.f, 14.f, -126.f, -127.f, -150.f, -INFINITY, -1e30f, 127.5f, 128.f, 1e9f};
    std::copy(std::begin(edges), std::end(edges), x.begin());
    Check check{"fast_exp2", true, run("exp2", exp2_kernel, kBlocks, kThreads, 0, bits_of(x), x.size()), {}};
    // 2 ulp on the device, half an ulp in the emulation, an ulp being at most 2^-23 of the value; subnormal results
    // may be zero.
    for (float value : x) check.allowed.push_back(std::exp2(std::min(value, 127.9f)) * 3 * 0x1p-23f + 0x1p-126f);
    checks.push_back(check);
}

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
    Check check{std::string("mma_m16n8k16 ") + type, true,
                run("mma", mma_kernel<T>, kBlocks, 32, 0, input, kBlocks * 32 * 4), {}};
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
    checks.push_back({"cp.async: copy, zero fill, groups, alignment", false,
                      run("copy", copy_kernel, kBlocks, kThreads, kThreads * 32, input, kBlocks * (kThreads * 8 + 1)),
                      {}});
}

__global__ void warp_kernel(const uint32_t *in, uint32_t *out) {
    const int lane = threadIdx.x;
    const uint32_t word = in[blockIdx.x * 32 + lane];
    const float value = static_cast<float>(static_cast<int>(word >> 8)) * 0x1p-20f;
    uint32_t *result = out + (blockIdx.x * 32 + lane) * 8;
    result[0] = __shfl_xor_sync(caco::kFullWarp, word, 1 + blockIdx.x % 31);
    result[1] = __shfl_sync(caco::kFullWarp, word, word % 32);
    result[2] = __ballot_sync(caco::kFullWarp, word % 3 == 0);
    result[3] = __any_sync(caco::kFullWarp, word % 64 == 0) ? 1 : 0;
    result[4] = __popc(word);
    result[5] = __ffs(static_cast<int>(word & 0xFFF0));
    const float sum = caco::warp_sum(value), largest = caco::warp_max(value);
    memcpy(result + 6, &sum, 4);
    memcpy(result + 7, &largest, 4);
}

void check_warp() {
    constexpr int kBlocks = 128;
    checks.push_back({"shuffles, votes, warp_sum, warp_max", false,
                      run("warp", warp_kernel, kBlocks, 32, 0, random_words(kBlocks * 32, 6), kBlocks * 256), {}});
}

void run_all() {
    check_rounding<bf16>("bf16");
    check_rounding<fp16>("fp16");
    check_exp2();
    check_copy();
    check_ldmatrix<false>("ldmatrix.x4");
    check_ldmatrix<true>("ldmatrix.x4.trans");
    check_mma<bf16>("bf16");
    check_mma<fp16>("fp16");
    check_warp();
}

// All results one after the other, each with its length before it.
bool write(const char *path) {
    std::FILE *file = std::fopen(path, "wb");
    if (!file) return false;
    bool good = true;
    for (const Check &check : checks) {
        const uint64_t count = check.found.size();
        good &= std::fwrite(&count, 8, 1, file) == 1;
        good &= std::fwrite(check.found.data(), 4, count, file) == count;
    }
    return (std::fclose(file) == 0) && good;
}

bool compare(const Check &check, const Words &expected) {
    double worst = 0;
    size_t wrong = 0, first = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        bool same = check.found[i] == expected[i];
        if (check.as_float && !same) {
            const float found = std::bit_cast<float>(check.found[i]), wanted = std::bit_cast<float>(expected[i]);
            const double share = std::abs(double(found) - wanted) / check.allowed[i];
            same = (std::isnan(found) && std::isnan(wanted)) || share <= 1;
            worst = std::max(worst, share);
        }
        if (!same && wrong++ == 0) first = i;
    }
    std::printf("%s  %-46s %8zu values", wrong ? "FAIL" : "ok  ", check.name.c_str(), expected.size());
    if (check.as_float) std::printf(", off by %.0f %% of what is allowed", 100 * worst);
    if (wrong) {
        std::printf(", %zu differ, first at %zu: %08x, emulated %08x", wrong, first, check.found[first],
                    expected[first]);
    }
    std::printf("\n");
    return wrong == 0;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2) return std::printf("usage: %s FILE [compare]\n", argv[0]), 2;
    try {
        run_all();
        if (argc == 2) {
            if (write(argv[1])) return std::printf("%zu checks written\n", checks.size()), 0;
            return std::printf("error: cannot write %s\n", argv[1]), 2;
        }
        std::FILE *file = std::fopen(argv[1], "rb");
        if (!file) return std::printf("error: cannot read %s\n", argv[1]), 2;
        bool good = true;
        for (const Check &check : checks) {
            uint64_t count = 0;
            Words expected(check.found.size());
            if (std::fread(&count, 8, 1, file) != 1 || count != expected.size() ||
                std::fread(expected.data(), 4, count, file) != count)
                return std::printf("error: %s was not written by this source\n", argv[1]), 2;
            good &= compare(check, expected);
        }
        std::fclose(file);
        return good ? 0 : 1;
    } catch (const std::exception &error) {
        return std::printf("error: %s\n", error.what()), 2;
    }
}
