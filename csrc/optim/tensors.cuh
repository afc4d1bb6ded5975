// A block working on one chunk of one tensor of a list. Legend: T tensors.
#pragma once
#include "../primitives.cuh"
#include "optim.h"

namespace caco {

constexpr int kTensorThreads = 256;
constexpr int kTensorWarps = kTensorThreads / 32;

__device__ __forceinline__ bool is_set(const float *flag) { return flag != nullptr && *flag != 0.f; }

struct Chunk {
    int tensor, count;          // its elements
    float *address[kMaxLists];  // of the first one
    bool aligned;               // all of them to 16 bytes
};

// The last tensor whose first chunk is not behind this one; a warp looks at 32 records a round.
__device__ __forceinline__ int tensor_of(const TensorRecord *__restrict__ table, int tensors, int64_t chunk) {
    const int lane = threadIdx.x % 32;
    int low = 0, high = tensors;  // the chunks of record low begin at or before this one, those of high after it
    while (high - low > 1) {
        const int step = (high - low + 31) / 32, at = low + lane * step;
        const unsigned before = __ballot_sync(kFullWarp, at < high && table[at].first_chunk <= chunk);
        low += (__popc(before) - 1) * step;
        high = low + step < high ? low + step : high;
    }
    return low;
}

template <int kLists>
__device__ __forceinline__ Chunk chunk_of(const TensorRecord *__restrict__ table, int tensors, int64_t number) {
    Chunk chunk;
    chunk.tensor = tensor_of(table, tensors, number);
    const TensorRecord &record = table[chunk.tensor];
    const int64_t begin = (number - record.first_chunk) * kChunkElements, left = record.count - begin;
    chunk.count = left < kChunkElements ? static_cast<int>(left) : kChunkElements;
    uint64_t bits = 0;
#pragma unroll
    for (int list = 0; list < kLists; list++) {
        chunk.address[list] = record.address[list] + begin;
        bits |= reinterpret_cast<uint64_t>(chunk.address[list]);
    }
    chunk.aligned = bits % sizeof(float4) == 0;
    return chunk;
}

// Four neighbouring elements from i on; those that the chunk does not have read as zero and are not written. Which
// elements a thread has does not depend on the alignment, nor therefore does the order of a sum.
struct Four {
    float value[4];

    __device__ __forceinline__ void load(const float *from, int i, const Chunk &chunk) {
        if (chunk.aligned && i + 4 <= chunk.count) {
            const float4 all = *reinterpret_cast<const float4 *>(from + i);
            value[0] = all.x, value[1] = all.y, value[2] = all.z, value[3] = all.w;
            return;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) value[k] = i + k < chunk.count ? from[i + k] : 0.f;
    }
    __device__ __forceinline__ void store(float *to, int i, const Chunk &chunk) const {
        if (chunk.aligned && i + 4 <= chunk.count) {
            *reinterpret_cast<float4 *>(to + i) = float4{value[0], value[1], value[2], value[3]};
            return;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (i + k < chunk.count) to[i + k] = value[k];
        }
    }
};

// Calls body(i) for the first element i of every four that this thread has.
template <class Body>
__device__ __forceinline__ void for_fours(const Chunk &chunk, Body &&body) {
    for (int i = 4 * static_cast<int>(threadIdx.x); i < chunk.count; i += 4 * kTensorThreads) body(i);
}

}  // namespace caco
