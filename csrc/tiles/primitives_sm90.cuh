// Hopper's own instructions by name, and their PTX for sm_90a. tests/emulation/warpgroup_instructions.h has the same
// functions for the CPU.
//
// Fragment layouts are those of the PTX manual, "Register fragments and shared memory matrix layouts" of wgmma. In a
// warpgroup, thread l of warp w (l = lane) holds of a D [64, n] accumulator, at d[j][e],
//   row 16 w + l / 4 + 8 (e / 2), column 8 j + 2 (l % 4) + e % 2,
// and of an A [64, 16] operand in registers what mma.m16n8k16 would have it hold of rows 16 w .. 16 w + 15.
//
// Operands in shared memory lie in slabs of 64 elements (128 bytes) a row, rows one after another, a slab at a
// multiple of 1024 bytes, its 16-byte chunks swizzled: chunk c of row r at c ^ (r % 8). TMA writes them so.
#pragma once
#include "../bank.h"
#include "primitives.cuh"

namespace caco {

using Mbarrier = uint64_t;
constexpr int kSlabChannels = 64, kSlabRowBytes = 128;
constexpr int kWarpgroupThreads = 128;

// An operand in shared memory as wgmma is told of it: the descriptor's low half with start and slab distance.
using Operand = uint32_t;
constexpr uint64_t kOperandLayout = uint64_t(1) << 62 | uint64_t(8 * kSlabRowBytes >> 4) << 32;  // 128-byte swizzle

__device__ __forceinline__ Operand further_by(Operand operand, int bytes) { return operand + bytes / 16; }
__device__ __forceinline__ uint64_t descriptor(Operand operand) { return kOperandLayout | operand; }

}  // namespace caco

// CACO_SM90A is defined if this pass of the compiler knows these instructions. Otherwise the bodies of the kernels that
// use them are empty.
#ifdef CACO_EMULATE
#include "emulation/warpgroup_instructions.h"
#else
#include <cuda.h>
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CACO_SM90A
#endif

namespace caco {

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Describes rows [count, padded] in operand type for copies of slabs of box_rows rows; rows beyond count read as zeros.
// The driver's function is looked up when first needed, so the module loads without a driver.
inline TensorMap make_tensor_map(const void *rows, int64_t count, int padded, OperandType type, int box_rows) {
    static const auto encode = [] {
        void *function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        if (status != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
            throw std::runtime_error(std::string("cuTensorMapEncodeTiled: ") + cudaGetErrorString(status));
        }
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    TensorMap map;
    const cuuint64_t extent[2] = {cuuint64_t(padded), cuuint64_t(count)};
    const cuuint64_t row_bytes[1] = {cuuint64_t(padded) * kOperandBytes};
    const cuuint32_t box[2] = {kSlabChannels, cuuint32_t(box_rows)}, element_strides[2] = {1, 1};
    const CUresult status = encode(
        &map, type == OperandType::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
        const_cast<void *>(rows), extent, row_bytes, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled: CUresult " + std::to_string(int(status)));
    }
    return map;
}

#ifdef CACO_SM90A

// Each phase of the barrier completes after `arrivals` arrivals and all bytes expected. By one thread, followed by
// mbarrier_init_fence and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(Mbarrier *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to TMA.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase wait for so many bytes of copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// A bounded wait never sleeps: the device decides how long try_wait does, so that many tries could take hours.
#ifdef CACO_BOUNDED_WAIT
#define CACO_MBARRIER_WAIT "test_wait"
#else
#define CACO_MBARRIER_WAIT "try_wait"
#endif

// Whether the phase of this parity has completed. try_wait may sleep a while for it.
__device__ __forceinline__ bool mbarrier_completed(uint32_t barrier, unsigned parity) {
    unsigned done;
    asm volatile("{\n.reg .pred p;\nmbarrier." CACO_MBARRIER_WAIT
                 ".parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

// Waits until the phase of this parity has completed: 0 for the first, third, ...; a new barrier counts as having
// completed one of parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier *barrier, unsigned parity) {
    const uint32_t address = shared_address(barrier);
#ifdef CACO_BOUNDED_WAIT
    for (int tries = 0; !mbarrier_completed(address, parity); tries++) {
        if (tries == kMostTries) give_up(address, parity);
    }
#else
    while (!mbarrier_completed(address, parity)) {
    }
#endif
}

// Starts the copy of a slab: 64 channels from `channel` on, box_rows rows from `row` on, which arrive as bytes at
// `barrier`. By one thread.
__device__ __forceinline__ void tma_load(void *to, const TensorMap *map, int channel, int row, Mbarrier *barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(to)),
        "l"(map), "r"(channel), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// Starts a plain copy of so many bytes from global to shared memory, which arrive at `barrier`; addresses and size are
// multiples of 16. By one thread.
__device__ __forceinline__ void bulk_load(void *to, const void *from, int bytes, Mbarrier *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Asks for so many bytes of global memory in the L2 cache; address and size are multiples of 16. Nobody waits for them.
__device__ __forceinline__ void bulk_prefetch(const void *from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
}

// A store to shared memory that products will read. TMA and wgmma are of another proxy than a thread's own loads and
// stores: they see it once the thread that stored has called async_proxy_fence, and a barrier has told the others.
template <class T>
__device__ __forceinline__ void store_for_products(T *to, T value) {
    *to = value;
}

// Orders this thread's own accesses to shared memory before those of TMA and wgmma that follow by way of a barrier: its
// stores before they are read, its loads before the place is filled again.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of kThreads threads of the block, whole warps; 0 is __syncthreads'.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier() {
    static_assert(kBarrier > 0 && kBarrier < 16 && kThreads % 32 == 0);
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// Registers per thread of this warpgroup from here on; the block's total must fit the multiprocessor.
template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// `slab_bytes`: from one slab to the next, used only if the operand's rows or columns (not k) run over several
// slabs; groups of 8 rows always follow each other.
__device__ __forceinline__ Operand swizzled_operand(const void *start, int slab_bytes) {
    Operand operand = shared_address(start) >> 4 | uint32_t(slab_bytes) >> 4 << 16;
    // Else the compiler keeps all that follow from it in registers, and spills others.
    asm volatile("" : "+r"(operand));
    return operand;
}

// Before a warpgroup's first product, and before the next one whenever registers of it were written otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define CACO_F4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])

// Waits until at most kGroups committed groups are under way. `d`: the accumulator that is complete after it; the
// compiler may not move its use before the wait.
template <int kGroups, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : CACO_F4(i)::"memory");
}

// What has been computed into d so far is computed before any wait that follows, and not put off until after it.
template <int kCount>
__device__ __forceinline__ void finish_before_wait(float (&d)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : CACO_F4(i)::"memory");
}

#define CACO_F16(i) CACO_F4(i), CACO_F4(i + 1), CACO_F4(i + 2), CACO_F4(i + 3)
#define CACO_F24 CACO_F16(0), CACO_F4(4), CACO_F4(5)
#define CACO_F32 CACO_F16(0), CACO_F16(4)
#define CACO_F48 CACO_F32, CACO_F16(8)
#define CACO_F64 CACO_F48, CACO_F16(12)
#define CACO_F128 CACO_F64, CACO_F16(16), CACO_F16(20), CACO_F16(24), CACO_F16(28)
#define CACO_D24 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define CACO_D0_31 CACO_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CACO_D32_47 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define CACO_D48_63 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CACO_D64_127                                                                                         \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "     \
    "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, " \
    "%120, %121, %122, %123, %124, %125, %126, %127"
#define CACO_D48 CACO_D0_31 CACO_D32_47
#define CACO_D64 CACO_D48 CACO_D48_63
#define CACO_D128 CACO_D64 CACO_D64_127

// d [64, n] = a b^T, or d += a b^T, for 16 channels of n streamed rows: a [64, 16] and b [n, 16] in shared memory, both
// with channels contiguous.
template <class T, int kCount>
__device__ __forceinline__ void wgmma_scores(float (&d)[kCount][4], Operand a, Operand b, bool accumulate) {
    constexpr int kColumns = 8 * kCount;
#define CACO_WGMMA(type, n, places, registers, a_place, b_place, p_place)                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p_place ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
                 "k16.f32." type "." type " {" places "}, %" a_place ", %" b_place ", p, 1, 1, 0, 0;\n}"  \
                 : registers                                                                              \
                 : "l"(descriptor(a)), "l"(descriptor(b)), "r"(int(accumulate)))
#define CACO_WGMMA_SHAPES(type)                                                                        \
    if constexpr (kColumns == 48) CACO_WGMMA(type, "48", CACO_D24, CACO_F24, "24", "25", "26");        \
    else if constexpr (kColumns == 96) CACO_WGMMA(type, "96", CACO_D48, CACO_F48, "48", "49", "50");   \
    else if constexpr (kColumns == 128) CACO_WGMMA(type, "128", CACO_D64, CACO_F64, "64", "65", "66"); \
    else static_assert(kColumns == 0, "no such shape")
    if constexpr (std::is_same_v<T, bf16>) {
        CACO_WGMMA_SHAPES("bf16");
    } else {
        CACO_WGMMA_SHAPES("f16");
    }
#undef CACO_WGMMA_SHAPES
#undef CACO_WGMMA
}

// d [64, n] += a b for 16 streamed rows of n channels: a [64, 16] in registers, b [16, n] in shared memory with
// channels contiguous.
template <class T, int kCount>
__device__ __forceinline__ void wgmma_accumulate(float (&d)[kCount][4], const uint32_t *a, Operand b) {
    constexpr int kChannels = 8 * kCount;
#define CACO_WGMMA(type, n, places, registers, a0, a1, a2, a3, b_place)                                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" places "}, {%" a0 ", %" a1 \
                 ", %" a2 ", %" a3 "}, %" b_place ", 1, 1, 1, 1;"                                               \
                 : registers                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)))
#define CACO_WGMMA_SHAPES(type)                                                                                     \
    if constexpr (kChannels == 64) CACO_WGMMA(type, "64", CACO_D0_31, CACO_F32, "32", "33", "34", "35", "36");      \
    else if constexpr (kChannels == 128) CACO_WGMMA(type, "128", CACO_D64, CACO_F64, "64", "65", "66", "67", "68"); \
    else if constexpr (kChannels == 256)                                                                            \
        CACO_WGMMA(type, "256", CACO_D128, CACO_F128, "128", "129", "130", "131", "132");                           \
    else static_assert(kChannels == 0, "no such shape")
    if constexpr (std::is_same_v<T, bf16>) {
        CACO_WGMMA_SHAPES("bf16");
    } else {
        CACO_WGMMA_SHAPES("f16");
    }
#undef CACO_WGMMA_SHAPES
#undef CACO_WGMMA
}

#endif  // CACO_SM90A

}  // namespace caco

#endif  // CACO_EMULATE
