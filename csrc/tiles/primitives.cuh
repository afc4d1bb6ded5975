// Every instruction that the kernels use, by name, and its PTX. tests/emulation/warp_instructions.h has the same functions
// for the CPU.
//
// Fragment layouts are those of the PTX manual, "Matrix fragments for mma.m16n8k16". In a warp, group = lane / 4 and
// pair = 2 * (lane % 4):
//   A [16, 16]  a[0]: (group, pair), a[1]: (group + 8, pair), a[2]: (group, pair + 8), a[3]: (group + 8, pair + 8)
//   B [16, 8]   b0: (pair, group), b1: (pair + 8, group)
//   D [16, 8]   d[0], d[1]: (group, pair), (group, pair + 1);  d[2], d[3]: the same of row group + 8
// where a register of A or B holds the named element in its low half and its neighbour along k in its high half.
//
// Those of mma.m8n8k4: lanes q 4 .. q 4 + 3 and 16 more are quadpair q (0..3) and do a product of their own. In it
//   A [8, 4], B [4, 8] by columns   the lane holds row (column) lane % 4 + 4 (lane / 16), its four elements in order
//   B [4, 8] by rows                row lane % 4, columns 4 (lane / 16) + {0..3}
//   D [8, 8]                        d[i]: row (lane & 1) + (i & 2) + 4 (lane / 16), column (lane & 2) + (i & 5)
#pragma once
#include <cstdint>
#ifndef __CUDACC_RTC__
#include <stdexcept>
#include <string>
#endif
#include <type_traits>
#ifdef CACO_EMULATE
#include "emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifdef CACO_BOUNDED_WAIT
#include "bounded_wait.cuh"
#endif
#endif

namespace caco {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// The architecture that is being compiled for, 800 for sm_80; 0 on the host and in emulation.
#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;
#endif

constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr float kLog2E = 1.4426950408889634f;

template <class T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16(x);
    else return __float2half(x);
}

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

// How the operand B of mma.m8n8k4 lies.
enum LayoutOfB { kColumnsOfB, kRowsOfB };

}  // namespace caco

#ifdef CACO_EMULATE
#include "emulation/warp_instructions.h"
#else

namespace caco {

// Two values rounded to T in one register, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, bf16>) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&pair);
    } else {
        __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&pair);
    }
}

// The two values of such a register.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t both) {
    if constexpr (std::is_same_v<T, bf16>) return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&both));
    else return __half22float2(*reinterpret_cast<__half2 *>(&both));
}

// 2^x; on the device to 2 ulp, subnormal results become zero.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// d += a b for a [16, 16] x [16, 8] product of T, accumulated in f32. All 32 lanes take part.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define CACO_MMA(type)                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "                  \
                 "{%8,%9}, {%0,%1,%2,%3};"                              \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (std::is_same_v<T, bf16>) CACO_MMA("bf16");
    else CACO_MMA("f16");
#undef CACO_MMA
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lanes 8 m .. 8 m + 7 name the rows of matrix m. Register m
// of a lane holds elements (lane / 4, pair), (lane / 4, pair + 1) of matrix m, or of its transpose.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void *row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTranspose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                     : "r"(address)
                     : "memory");
    }
}

// d += a b for the four [8, 4] x [4, 8] products of a warp's quadpairs in fp16, accumulated in f32. d0 holds the
// registers 0..3 of D, d1 4..7. All 32 lanes take part.
template <LayoutOfB kLayout>
__device__ __forceinline__ void mma_m8n8k4(float (&d0)[4], float (&d1)[4], uint32_t a0, uint32_t a1, uint32_t b0,
                                           uint32_t b1) {
#define CACO_MMA(layout)                                                                                      \
    asm volatile("mma.sync.aligned.m8n8k4.row." layout                                                        \
                 ".f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};" \
                 : "+f"(d0[0]), "+f"(d0[1]), "+f"(d0[2]), "+f"(d0[3]), "+f"(d1[0]), "+f"(d1[1]), "+f"(d1[2]), \
                   "+f"(d1[3])                                                                                \
                 : "r"(a0), "r"(a1), "r"(b0), "r"(b1))
    if constexpr (kLayout == kColumnsOfB) CACO_MMA("col");
    else CACO_MMA("row");
#undef CACO_MMA
}

// 16 bytes of shared memory, by all 32 lanes. The device serves 8 lanes at a time.
__device__ __forceinline__ void load_shared_16(uint32_t (&registers)[4], const void *from) {
    const uint4 words = *static_cast<const uint4 *>(from);
    registers[0] = words.x, registers[1] = words.y, registers[2] = words.z, registers[3] = words.w;
}

// 16 bytes from global to shared memory, in the background; zeros when not valid, and then `from` is not read.
__device__ __forceinline__ void copy_async_16(void *to, const void *from, bool valid) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(from), "r"(valid ? 16 : 0)
        : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroups of this thread's groups are under way. Other threads see the data after a barrier.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// The block's dynamic shared memory, aligned to 1024 bytes.
__device__ __forceinline__ char *shared_memory() {
    extern __shared__ __align__(1024) char caco_shared_memory[];
    return caco_shared_memory;
}

// While it lives, this thread's kernels go to `device`; then back to the device before.
class DeviceScope {
   public:
#ifdef __CUDACC_RTC__
    explicit DeviceScope(int) {}
#else
    explicit DeviceScope(int device) {
        cudaError_t status = cudaGetDevice(&before_);
        if (status == cudaSuccess) status = cudaSetDevice(device);
        if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA device: ") + cudaGetErrorString(status));
    }
    ~DeviceScope() { cudaSetDevice(before_); }

   private:
    int before_ = 0;
#endif
};

// Enqueues kernel<<<grid, threads>>>(arguments...); throws std::runtime_error with CUDA's own words when refused.
template <class Kernel, class... Arguments>
void launch(const char *name, Kernel kernel, dim3 grid, int threads, int shared_bytes, void *stream,
            Arguments... arguments) {
#ifdef __CUDACC_RTC__  // NVRTC compiles the kernels, for tools/check/sass.py --sm70, and launches nothing
    (void)name, (void)kernel;
#else
    cudaError_t status = cudaSuccess;
    if (shared_bytes > 48 * 1024) {  // more than this must be asked for
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
#ifdef CACO_BOUNDED_WAIT
    static const Note *note = open_note();
#endif
    if (status == cudaSuccess) {
        kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
        status = cudaGetLastError();
    }
#ifdef CACO_BOUNDED_WAIT
    if (status == cudaSuccess) status = finish(name, note);
#endif
    if (status != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
#endif
}

}  // namespace caco

#endif  // CACO_EMULATE
