// A warp works on one row of C channels in registers: a lane holds up to four neighbouring ones at a time, so that one
// access moves 16 bytes.
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

// The sums of several values at once, so that the steps of one sum run under those of the others.
template <int kCount>
__device__ __forceinline__ void warp_sums(float (&x)[kCount]) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
#pragma unroll
        for (float &value : x) value += __shfl_xor_sync(kFullWarp, value, bits);
    }
}

// 1 / |row| from |row|^2 by one Newton step, within 2 ulp and without a branch. 0 for a row of zeros and for one whose
// square is not finite: their unit rows count as zeros.
__device__ __forceinline__ float inverse_root(float square) {
    const float root = rsqrtf(square);
    return square > 0.f && square < INFINITY ? root * fmaf(-0.5f * square * root, root, 1.5f) : 0.f;
}

// What one access moves: `kCount` neighbouring values.
template <class Value, int kCount>
struct alignas(kCount * sizeof(Value)) Neighbours {
    Value value[kCount];
};

// Whether rows of so many floats, one after another from `rows` on, begin at multiples of 16 bytes.
__device__ __forceinline__ bool rows_are_aligned(const void *rows, int channels) {
    return channels % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0;
}

template <int kPadded>
struct Row {
    static constexpr int kValues = kPadded / 32;
    static constexpr int kTogether = kValues < 4 ? kValues : 4;  // neighbouring channels of a lane
    static_assert(kPadded % 32 == 0 && kValues % kTogether == 0 && kTogether % 2 == 0);
    using Floats = Neighbours<float, kTogether>;
    using Operands = Neighbours<uint32_t, kTogether / 2>;
    float value[kValues];

    // The channel of value i; those of i, i + 1, .. i + kTogether - 1 are neighbours if i is a multiple of kTogether.
    __device__ static __forceinline__ int channel(int i, int lane) {
        return (i / kTogether * 32 + lane) * kTogether + i % kTogether;
    }

    // Channels beyond `channels` read as zero. aligned: what rows_are_aligned says of this row, or of all of them.
    __device__ __forceinline__ void load(const float *__restrict__ row, int channels, int lane, bool aligned) {
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kValues; i += kTogether) {
                Floats floats{};
                if (channel(i, lane) < channels) floats = *reinterpret_cast<const Floats *>(row + channel(i, lane));
#pragma unroll
                for (int n = 0; n < kTogether; n++) value[i + n] = floats.value[n];
            }
        } else {
#pragma unroll
            for (int i = 0; i < kValues; i++) value[i] = channel(i, lane) < channels ? row[channel(i, lane)] : 0.f;
        }
    }
    __device__ __forceinline__ void load(const float *__restrict__ row, int channels, int lane) {
        load(row, channels, lane, rows_are_aligned(row, channels));
    }
    __device__ __forceinline__ void store(float *__restrict__ row, int channels, int lane, bool aligned) const {
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kValues; i += kTogether) {
                Floats floats;
#pragma unroll
                for (int n = 0; n < kTogether; n++) floats.value[n] = value[i + n];
                if (channel(i, lane) < channels) *reinterpret_cast<Floats *>(row + channel(i, lane)) = floats;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kValues; i++) {
                if (channel(i, lane) < channels) row[channel(i, lane)] = value[i];
            }
        }
    }
    __device__ __forceinline__ void store(float *__restrict__ row, int channels, int lane) const {
        store(row, channels, lane, rows_are_aligned(row, channels));
    }
    // Values i .. i + kTogether - 1 in operand type.
    template <class T>
    __device__ __forceinline__ Operands operands(int i, float scale) const {
        Operands words;
#pragma unroll
        for (int n = 0; n < kTogether; n += 2) {
            words.value[n / 2] = pack<T>(value[i + n] * scale, value[i + n + 1] * scale);
        }
        return words;
    }
    // Zeros beyond C are written too.
    template <class T>
    __device__ __forceinline__ void store_operand(T *__restrict__ row, float scale, int lane) const {
#pragma unroll
        for (int i = 0; i < kValues; i += kTogether) {
            *reinterpret_cast<Operands *>(row + channel(i, lane)) = operands<T>(i, scale);
        }
    }
    // The sum over this lane's channels; warp_sum makes it that of the rows.
    __device__ __forceinline__ float part_of_dot(const Row &other) const {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kValues; i++) sum = fmaf(value[i], other.value[i], sum);
        return sum;
    }
    __device__ __forceinline__ float dot(const Row &other) const { return warp_sum(part_of_dot(other)); }
    __device__ __forceinline__ float inverse_norm() const { return inverse_root(dot(*this)); }
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
