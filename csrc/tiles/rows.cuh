// A warp works on one row of C channels: lane l holds channels l, l + 32, ... in registers.
#pragma once
#include "../bank.h"
#include "primitives.cuh"

namespace caco {

constexpr int kRowWarps = 8;  // rows per block in kernels that give each warp a row
constexpr int kRowThreads = 32 * kRowWarps;

// Probabilities are kept times 2^14 in operand type: half precision then holds them down to 2^-38 of the largest, and a
// largest of 1, or of 1.9 if a given lse is that far off, stays below its 65504.
constexpr float kProbabilityScaleLog2 = 14.f;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullWarp, x, bits);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, bits));
    return x;
}

template <int kPadded>
struct Row {
    static constexpr int kValues = kPadded / 32;
    static_assert(kPadded % 32 == 0);
    float value[kValues];

    // Channels beyond `channels` read as zero.
    __device__ __forceinline__ void load(const float *__restrict__ row, int channels, int lane) {
#pragma unroll
        for (int i = 0; i < kValues; i++) value[i] = lane + 32 * i < channels ? row[lane + 32 * i] : 0.f;
    }
    __device__ __forceinline__ void store(float *__restrict__ row, int channels, int lane) const {
#pragma unroll
        for (int i = 0; i < kValues; i++) {
            if (lane + 32 * i < channels) row[lane + 32 * i] = value[i];
        }
    }
    // Zeros beyond C are written too.
    template <class T>
    __device__ __forceinline__ void store_operand(T *__restrict__ row, float scale, int lane) const {
#pragma unroll
        for (int i = 0; i < kValues; i++) row[lane + 32 * i] = from_float<T>(value[i] * scale);
    }
    __device__ __forceinline__ float dot(const Row &other) const {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kValues; i++) sum = fmaf(value[i], other.value[i], sum);
        return warp_sum(sum);
    }
    // 1 / |row|, and 0 for a row of zeros: its unit row counts as zeros.
    __device__ __forceinline__ float inverse_norm() const {
        const float square = dot(*this);
        return square > 0.f ? 1.f / sqrtf(square) : 0.f;
    }
};

// Calls body(std::integral_constant<int, P>{}) for the padded size of `channels`.
template <class Body>
void for_padded_channels(int channels, Body &&body) {
    switch (padded_channels(channels)) {
        case 64:
            return body(std::integral_constant<int, 64>{});
        case 128:
            return body(std::integral_constant<int, 128>{});
        case 256:
            return body(std::integral_constant<int, 256>{});
        default:
            return body(std::integral_constant<int, 512>{});
    }
}

// The same with a value of the operand type before it: body(bf16{} or fp16{}, std::integral_constant<int, P>{}).
template <class Body>
void for_operand(OperandType type, int channels, Body &&body) {
    for_padded_channels(channels, [&](auto padded) {
        if (type == OperandType::kBfloat16) body(bf16{}, padded);
        else body(fp16{}, padded);
    });
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The grid of a kernel that gives each warp a row.
inline dim3 warp_rows_grid(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowWarps))); }

}  // namespace caco
