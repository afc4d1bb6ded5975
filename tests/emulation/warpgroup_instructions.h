// The functions of csrc/tiles/primitives_sm90.cuh for the CPU: each does what its namesake there says, and fails if it is
// used wrongly. Included by that file only.
#pragma once
#include "hopper.h"

#define CACO_SM90A

namespace caco {

using TensorMap = emu::TensorMap;

inline TensorMap make_tensor_map(const void *rows, int64_t count, int padded, OperandType type, int box_rows) {
    (void)type;
    if (reinterpret_cast<uintptr_t>(rows) % 16) throw std::runtime_error("tensor map: rows are not 16-byte aligned");
    return {static_cast<const uint16_t *>(rows), count, padded, box_rows, true};
}

__device__ __forceinline__ void mbarrier_init(Mbarrier *barrier, int arrivals) {
    emu::mbarrier_init(barrier, arrivals);
}

__device__ __forceinline__ void mbarrier_init_fence() {}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier *barrier) { emu::mbarrier_arrive(barrier, 0); }

__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier *barrier, int bytes) {
    emu::mbarrier_arrive(barrier, bytes);
}

__device__ __forceinline__ void mbarrier_wait(Mbarrier *barrier, unsigned parity) {
    emu::mbarrier_wait(barrier, parity);
}

__device__ __forceinline__ void tma_load(void *to, const TensorMap *map, int channel, int row, Mbarrier *barrier) {
    emu::bulk_copy(to, *map, channel, row, barrier);
}

__device__ __forceinline__ void bulk_load(void *to, const void *from, int bytes, Mbarrier *barrier) {
    emu::bulk_copy(to, from, bytes, barrier);
}

__device__ __forceinline__ void bulk_prefetch(const void *from, int bytes) { emu::bulk_prefetch(from, bytes); }

template <class T>
__device__ __forceinline__ void store_for_products(T *to, T value) {
    emu::store_for_products(to, value);
}

__device__ __forceinline__ void async_proxy_fence() { emu::async_proxy_fence(); }

template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier() {
    static_assert(kBarrier > 0 && kBarrier < 16 && kThreads % 32 == 0);
    emu::barrier(kBarrier, kThreads, "named barrier");
}

template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
}

__device__ __forceinline__ Operand swizzled_operand(const void *start, int slab_bytes) {
    return uint32_t(emu::shared_offset(start)) >> 4 | uint32_t(slab_bytes) >> 4 << 16;
}

__device__ __forceinline__ void wgmma_fence() { emu::warpgroup_fence(); }

__device__ __forceinline__ void wgmma_commit() { emu::warpgroup_commit(); }

template <int kGroups, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount][4]) {
    (void)d;
    emu::warpgroup_wait(kGroups);
}

template <int kCount>
__device__ __forceinline__ void finish_before_wait(float (&d)[kCount][4]) {
    (void)d;
}

template <class T, int kCount>
__device__ __forceinline__ void wgmma_scores(float (&d)[kCount][4], Operand a, Operand b, bool accumulate) {
    constexpr int kColumns = 8 * kCount;
    emu::Product shape{};
    shape.accumulate = accumulate, shape.a = descriptor(a), shape.b = descriptor(b), shape.n = kColumns;
    shape.to_float = std::is_same_v<T, bf16> ? emu::bfloat16_to_float : emu::half_to_float;
    emu::warpgroup_product("wgmma of shared memory", d[0], nullptr, shape);
}

template <class T, int kCount>
__device__ __forceinline__ void wgmma_accumulate(float (&d)[kCount][4], const uint32_t *a, Operand b) {
    constexpr int kChannels = 8 * kCount;
    emu::Product shape{};
    shape.accumulate = shape.a_in_registers = shape.b_transposed = true, shape.b = descriptor(b), shape.n = kChannels;
    shape.to_float = std::is_same_v<T, bf16> ? emu::bfloat16_to_float : emu::half_to_float;
    emu::warpgroup_product("wgmma of registers", d[0], a, shape);
}

}  // namespace caco
