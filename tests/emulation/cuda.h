// The part of CUDA's vocabulary that the kernels use, for g++: qualifiers, indices, half types, shuffles, barriers,
// maths. csrc/tiles/primitives.cuh includes this file in place of the CUDA headers if CACO_EMULATE is set.
#pragma once
#include <bit>
#include <cmath>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define threadIdx (emu::self->index)
#define blockIdx (emu::block->index)
#define blockDim (emu::block->threads_shape)
#define gridDim (emu::block->grid_shape)

using cudaStream_t = void *;

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emu {

inline float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t float_to_bfloat16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    if (value != value) return 0x7FFF;
    return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & 0x7FFF) << 13;
    if ((bits & 0x7C00) == 0x7C00) return std::bit_cast<float>(sign | 0x7F800000 | magnitude);
    // Read as an f32 the exponent is 112 too small; the product is exact, for subnormal halves too.
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f));
}

inline uint16_t float_to_half(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value), magnitude = u & 0x7FFFFFFF;
    const uint16_t sign = u >> 16 & 0x8000;
    if (magnitude > 0x7F800000) return 0x7FFF;
    if (magnitude >= 0x477FF000) return sign | 0x7C00;
    // Below the smallest normal half, adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
    if (magnitude < 0x38800000) return sign | uint16_t(std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f));
    return sign | uint16_t((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

template <class T>
T shuffle(unsigned mask, const char *operation, T value, int source) {
    struct In {
        T value;
        int source;
    } in{value, source};
    T out;
    collective(mask, operation, in, out, [mask](auto ins, auto outs) {
        for (int lane = 0; lane < 32; lane++) {
            if (!(mask >> lane & 1)) continue;
            const int from = ins[lane]->source & 31;
            *outs[lane] = ins[mask >> from & 1 ? from : lane]->value;
        }
    });
    return out;
}

}  // namespace emu

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return emu::bfloat16_to_float(x.bits); }
inline __nv_bfloat16 __float2bfloat16(float x) { return {emu::float_to_bfloat16(x)}; }
inline float __half2float(__half x) { return emu::half_to_float(x.bits); }
inline __half __float2half(float x) { return {emu::float_to_half(x)}; }

inline void __syncthreads() { emu::barrier(0, static_cast<int>(emu::block->threads.size()), "__syncthreads"); }

inline void __syncwarp(unsigned mask = ~0u) {
    emu::Gate &gate = emu::block->warps[emu::self->warp];
    emu::order_release(&gate);
    int none = 0, out;
    emu::collective(mask, "__syncwarp", none, out, [](auto, auto) {});
    emu::order_acquire(&gate);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    return emu::shuffle(mask, "__shfl_sync", value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return emu::shuffle(mask, "__shfl_xor_sync", value, emu::self->lane ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned out;
    emu::collective(mask, "__ballot_sync", predicate, out, [mask](auto ins, auto outs) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; lane++) votes |= (mask >> lane & 1 && *ins[lane] != 0) ? 1u << lane : 0u;
        for (int lane = 0; lane < 32; lane++) {
            if (mask >> lane & 1) *outs[lane] = votes;
        }
    });
    return out;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
// Correctly rounded but for one rounding more; the device is off by up to 2 ulp, which a Newton step mends.
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T atomicAdd(T *address, T value) {
    return std::atomic_ref<T>(*address).fetch_add(value);
}
