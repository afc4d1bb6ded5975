// A program that runs checks of primitives, on the CPU or on a GPU, and compares the results of the two.
//
//     PROGRAM FILE            runs all checks, writes their results
//     PROGRAM FILE compare    runs them again and compares with FILE, written by the other build
//
// Built by g++ with CACO_EMULATE the program runs on the CPU, built by nvcc on the GPU: the emulated one writes, the
// other compares. A value passes if it is off by at most what `allowed` says, 0 for primitives that move or round
// bits; NaN equals NaN. Prints a line per check and returns 0, 1 (a difference) or 2 (it could not run).
//
// To add a primitive: a kernel, and a check that appends to `checks`. A program defines run_all().
#pragma once
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tiles/primitives.cuh"
#include "tiles/rows.cuh"

void run_all();

namespace {

using caco::bf16;
using caco::fp16;
using Words = std::vector<uint32_t>;

struct Check {
    std::string name;
    bool as_float;               // else compared bit by bit
    Words found;                 // of this run
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
    checks.push_back({std::string("pack and from_float ") + type,
                      false,
                      run("rounding", rounding_kernel<T>, kBlocks, kThreads, 0, input, input.size()),
                      {}});
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
    checks.push_back({"shuffles, votes, warp_sum, warp_max",
                      false,
                      run("warp", warp_kernel, kBlocks, 32, 0, random_words(kBlocks * 32, 6), kBlocks * 256),
                      {}});
}

// What every path uses.
void check_common() {
    check_rounding<bf16>("bf16");
    check_rounding<fp16>("fp16");
    check_exp2();
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
