// Every instruction that the kernels use by name, each with a device body (PTX) and a host body (emulation/).
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
constexpr float kLn2 = 0.6931471805599453f;

template <class T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16(x);
    else return __float2half(x);
}

// Two values rounded to T in one register, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef CACO_EMULATE
    return uint32_t(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
#else
    if constexpr (std::is_same_v<T, bf16>) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&pair);
    } else {
        __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&pair);
    }
#endif
}

// 2^x; on the device to 2 ulp, subnormal results become zero.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef CACO_EMULATE
    return std::exp2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// d += a b for a [16, 16] x [16, 8] product of T, accumulated in f32. All 32 lanes take part.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef CACO_EMULATE
    struct In {
        float *d;
        const uint32_t *a;
        uint32_t b[2];
    } in{d, a, {b0, b1}};
    int none;
    emu::collective(kFullWarp, "mma.m16n8k16", in, none, [](auto lanes, auto) {
        emu::count(emu::counters.matrix_products);
        auto value = [](uint32_t reg, int half) {
            const uint16_t bits = half ? reg >> 16 : reg & 0xFFFF;
            return std::is_same_v<T, bf16> ? emu::bfloat16_to_float(bits) : emu::half_to_float(bits);
        };
        float a[16][16], b[16][8], d[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const int group = lane / 4, pair = 2 * (lane % 4);
            for (int e = 0; e < 2; e++) {
                for (int r = 0; r < 4; r++)
                    a[group + 8 * (r & 1)][pair + e + 8 * (r >> 1)] = value(lanes[lane]->a[r], e);
                for (int r = 0; r < 2; r++) b[pair + e + 8 * r][group] = value(lanes[lane]->b[r], e);
                for (int r = 0; r < 2; r++) d[group + 8 * r][pair + e] = lanes[lane]->d[2 * r + e];
            }
        }
        for (int m = 0; m < 16; m++) {
            for (int k = 0; k < 16; k++) {
                for (int n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            const int group = lane / 4, pair = 2 * (lane % 4);
            for (int e = 0; e < 4; e++) lanes[lane]->d[e] = d[group + 8 * (e >> 1)][pair + (e & 1)];
        }
    });
#else
#define CACO_MMA(type)                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "                  \
                 "{%8,%9}, {%0,%1,%2,%3};"                              \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (std::is_same_v<T, bf16>) CACO_MMA("bf16");
    else CACO_MMA("f16");
#undef CACO_MMA
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lanes 8 m .. 8 m + 7 name the rows of matrix m. Register m
// of a lane holds elements (lane / 4, pair), (lane / 4, pair + 1) of matrix m, or of its transpose.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void *row) {
#ifdef CACO_EMULATE
    struct In {
        uint16_t elements[8];
        const void *row;
        uint32_t *registers;
    } in;
    if (reinterpret_cast<uintptr_t>(row) % 16) emu::fail("ldmatrix: misaligned row address");
    for (int i = 0; i < 8; i++)
        in.elements[i] = static_cast<const uint16_t *>(row)[i];  // a lane reads the row it names
    in.row = row, in.registers = registers;
    int none;
    emu::collective(kFullWarp, kTranspose ? "ldmatrix.x4.trans" : "ldmatrix.x4", in, none, [](auto lanes, auto) {
        emu::count(emu::counters.matrix_loads);
        for (int m = 0; m < 4; m++) {
            unsigned banks = 0;  // of 16 bytes
            for (int i = 0; i < 8; i++) {
                const unsigned bank = 1u << (reinterpret_cast<uintptr_t>(lanes[8 * m + i]->row) / 16 % 8);
                if (banks & bank) emu::count(emu::counters.bank_conflicts);
                banks |= bank;
            }
            for (int lane = 0; lane < 32; lane++) {
                const int group = lane / 4, pair = 2 * (lane % 4);
                auto element = [&](int row, int column) -> uint32_t {
                    return kTranspose ? lanes[8 * m + column]->elements[row] : lanes[8 * m + row]->elements[column];
                };
                lanes[lane]->registers[m] = element(group, pair) | element(group, pair + 1) << 16;
            }
        }
    });
#else
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
#endif
}

enum LayoutOfB { kColumnsOfB, kRowsOfB };

// d += a b for the four [8, 4] x [4, 8] products of a warp's quadpairs in fp16, accumulated in f32. d0 holds the
// registers 0..3 of D, d1 4..7. All 32 lanes take part.
template <LayoutOfB kLayout>
__device__ __forceinline__ void mma_m8n8k4(float (&d0)[4], float (&d1)[4], uint32_t a0, uint32_t a1, uint32_t b0,
                                           uint32_t b1) {
#ifdef CACO_EMULATE
    struct In {
        float *d[2];
        uint32_t a[2], b[2];
    } in{{d0, d1}, {a0, a1}, {b0, b1}};
    int none;
    emu::collective(kFullWarp, "mma.m8n8k4", in, none, [](auto lanes, auto) {
        emu::count(emu::counters.matrix_products);
        auto value = [](const uint32_t *registers, int i) {
            return emu::half_to_float(registers[i / 2] >> (16 * (i % 2)) & 0xFFFF);
        };
        for (int quadpair = 0; quadpair < 4; quadpair++) {
            float a[8][4], b[4][8];
            for (int member = 0; member < 8; member++) {
                const In &lane = *lanes[4 * quadpair + member % 4 + member / 4 * 16];
                for (int i = 0; i < 4; i++) {
                    a[member][i] = value(lane.a, i);
                    if (kLayout == kColumnsOfB) b[i][member] = value(lane.b, i);
                    else b[member % 4][member / 4 * 4 + i] = value(lane.b, i);
                }
            }
            for (int member = 0; member < 8; member++) {
                const In &lane = *lanes[4 * quadpair + member % 4 + member / 4 * 16];
                for (int i = 0; i < 8; i++) {
                    const int row = (member & 1) + (i & 2) + (member & 4);
                    const int column = (member & 2) + (i & 1) + (i & 4);
                    for (int k = 0; k < 4; k++) lane.d[i / 4][i % 4] += a[row][k] * b[k][column];
                }
            }
        }
    });
#else
#define CACO_MMA(layout)                                                                                         \
    asm volatile("mma.sync.aligned.m8n8k4.row." layout                                                           \
                 ".f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};"    \
                 : "+f"(d0[0]), "+f"(d0[1]), "+f"(d0[2]), "+f"(d0[3]), "+f"(d1[0]), "+f"(d1[1]), "+f"(d1[2]),    \
                   "+f"(d1[3])                                                                                   \
                 : "r"(a0), "r"(a1), "r"(b0), "r"(b1))
    if constexpr (kLayout == kColumnsOfB) CACO_MMA("col");
    else CACO_MMA("row");
#undef CACO_MMA
#endif
}

// 16 bytes of shared memory, by all 32 lanes. The device serves 8 lanes at a time.
__device__ __forceinline__ void load_shared_16(uint32_t (&registers)[4], const void *from) {
#ifdef CACO_EMULATE
    if (reinterpret_cast<uintptr_t>(from) % 16) emu::fail("16-byte load: misaligned address");
    int none;
    emu::collective(kFullWarp, "16-byte load", from, none, [](auto lanes, auto) {
        emu::count(emu::counters.matrix_loads);
        for (int phase = 0; phase < 32; phase += 8) {
            for (int i = phase; i < phase + 8; i++) {
                for (int j = phase; j < i; j++) {  // lanes that read the same bytes do not conflict
                    const auto one = reinterpret_cast<uintptr_t>(*lanes[i]) / 16;
                    const auto two = reinterpret_cast<uintptr_t>(*lanes[j]) / 16;
                    if (one != two && one % 8 == two % 8) emu::count(emu::counters.bank_conflicts);
                }
            }
        }
    });
    for (int i = 0; i < 4; i++) registers[i] = static_cast<const uint32_t *>(from)[i];
#else
    const uint4 words = *static_cast<const uint4 *>(from);
    registers[0] = words.x, registers[1] = words.y, registers[2] = words.z, registers[3] = words.w;
#endif
}

// 16 bytes from global to shared memory, in the background; zeros when not valid, and then `from` is not read.
__device__ __forceinline__ void copy_async_16(void *to, const void *from, bool valid) {
#ifdef CACO_EMULATE
    emu::async_copy(to, from, 16, valid);
#else
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(from), "r"(valid ? 16 : 0)
        : "memory");
#endif
}

// Closes this thread's group of copies.
__device__ __forceinline__ void copy_async_commit() {
#ifdef CACO_EMULATE
    emu::async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups are under way. Other threads see the data after a barrier.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
#ifdef CACO_EMULATE
    emu::async_wait(kGroups);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// The block's dynamic shared memory, aligned to 1024 bytes.
__device__ __forceinline__ char *shared_memory() {
#ifdef CACO_EMULATE
    return emu::block->shared;
#else
    extern __shared__ __align__(1024) char caco_shared_memory[];
    return caco_shared_memory;
#endif
}

// While it lives, this thread's kernels go to `device`; then back to the device before.
class DeviceScope {
   public:
#if defined(CACO_EMULATE) || defined(__CUDACC_RTC__)
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
#ifdef CACO_EMULATE
    (void)name, (void)stream;
    emu::launch(grid, dim3(threads), shared_bytes, [=] { kernel(arguments...); });
#elif defined(__CUDACC_RTC__)  // NVRTC compiles the kernels, for tools/check/sm70.py, and launches nothing
    (void)name, (void)kernel;
#else
    cudaError_t status = cudaSuccess;
    if (shared_bytes > 48 * 1024) {  // more than this must be asked for
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    if (status == cudaSuccess) {
        kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
        status = cudaGetLastError();
    }
    if (status != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
#endif
}

}  // namespace caco
