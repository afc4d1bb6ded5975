// One step of LARS on a list of tensors: norms in two stages, then the update.
//
//     lars_norms [trusted chunks] -> sum w^2, sum d^2 of each chunk -> lars_ratio [trusted tensors] -> lars_step [chunks]
//
// Every sum has one order: over a thread's elements, the block's threads, the tensor's chunks. Bytes per element: norms
// read 8, the step reads 12 and writes 8. Limits: 2^31 - 1 chunks.
#include "../rows.cuh"
#include "tensors.cuh"

namespace caco {
namespace {

struct Squares {
    float weight, direction;
};

// Of all threads of the block, in each of them.
__device__ __forceinline__ Squares block_sum(Squares mine) {
    Squares *of_warp = reinterpret_cast<Squares *>(shared_memory());  // [warps]
    mine = {warp_sum(mine.weight), warp_sum(mine.direction)};
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    Squares sum{0.f, 0.f};
    for (int warp = 0; warp < kTensorWarps; warp++) {
        sum.weight += of_warp[warp].weight, sum.direction += of_warp[warp].direction;
    }
    return sum;
}

__device__ __forceinline__ float inverse_scale(const float *scale) { return scale == nullptr ? 1.f : 1.f / *scale; }

// A block per chunk of a trusted tensor.
__global__ void __launch_bounds__(kTensorThreads)
    lars_norms_kernel(const TensorRecord *__restrict__ table,  // [T + 1]
                      int tensors, Squares *__restrict__ squares,  // [trusted chunks]
                      const float *__restrict__ grad_scale, const float *__restrict__ skip, float weight_decay) {
    if (is_set(skip)) return;
    const Chunk chunk = chunk_of<2>(table, tensors, blockIdx.x);
    const float unscale = inverse_scale(grad_scale);
    Squares sum{0.f, 0.f};
    for_fours(chunk, [&](int i) {
        Four weight, grad;
        weight.load(chunk.address[0], i, chunk);
        grad.load(chunk.address[1], i, chunk);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float direction = fmaf(weight_decay, weight.value[k], grad.value[k] * unscale);
            sum.weight = fmaf(weight.value[k], weight.value[k], sum.weight);
            sum.direction = fmaf(direction, direction, sum.direction);
        }
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// A block per trusted tensor.
__global__ void __launch_bounds__(kTensorThreads)
    lars_ratio_kernel(const TensorRecord *__restrict__ table,   // [T + 1]
                      const Squares *__restrict__ squares,      // [trusted chunks]
                      float *__restrict__ ratio,                // [trusted]
                      const float *__restrict__ skip, float trust) {
    if (is_set(skip)) return;
    const int64_t end = table[blockIdx.x + 1].first_chunk;
    Squares sum{0.f, 0.f};
    for (int64_t at = table[blockIdx.x].first_chunk + threadIdx.x; at < end; at += kTensorThreads) {
        sum.weight += squares[at].weight, sum.direction += squares[at].direction;
    }
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    const bool known = sum.weight > 0.f && sum.direction > 0.f;
    ratio[blockIdx.x] = known ? trust * sqrtf(sum.weight) / sqrtf(sum.direction) : 1.f;
}

// A block per chunk of every tensor.
__global__ void __launch_bounds__(kTensorThreads)
    lars_step_kernel(const TensorRecord *__restrict__ table,  // [T + 1]
                     int tensors, int trusted,
                     const float *__restrict__ ratio,         // [trusted]
                     const float *__restrict__ grad_scale, const float *__restrict__ skip,
                     const float *__restrict__ device_lr, float momentum, float weight_decay) {
    if (is_set(skip)) return;
    const float lr = *device_lr;
    const Chunk chunk = chunk_of<3>(table, tensors, blockIdx.x);
    const bool is_trusted = chunk.tensor < trusted;
    const float decay = is_trusted ? weight_decay : 0.f, scale = is_trusted ? ratio[chunk.tensor] : 1.f;
    const float unscale = inverse_scale(grad_scale);
    for_fours(chunk, [&](int i) {
        Four weight, grad, velocity;
        weight.load(chunk.address[0], i, chunk);
        grad.load(chunk.address[1], i, chunk);
        velocity.load(chunk.address[2], i, chunk);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float direction = fmaf(decay, weight.value[k], grad.value[k] * unscale);
            velocity.value[k] = fmaf(momentum, velocity.value[k], scale * direction);
            weight.value[k] = fmaf(-lr, velocity.value[k], weight.value[k]);
        }
        velocity.store(chunk.address[2], i, chunk);
        weight.store(chunk.address[0], i, chunk);
    });
}

constexpr int kSharedBytes = kTensorWarps * sizeof(Squares);

}  // namespace

void lars_step(const LarsStepParams &params, const Target &target) {
    if (params.chunks == 0) return;
    const DeviceScope scope(target.device);
    auto *squares = static_cast<Squares *>(params.workspace);
    auto *ratio = reinterpret_cast<float *>(squares + params.trusted_chunks);
    if (params.trusted_chunks > 0) {
        launch("lars_step norms", lars_norms_kernel, dim3(static_cast<unsigned>(params.trusted_chunks)), kTensorThreads,
               kSharedBytes, target.stream, params.table, params.trusted, squares, params.grad_scale, params.skip,
               params.weight_decay);
        launch("lars_step ratio", lars_ratio_kernel, dim3(static_cast<unsigned>(params.trusted)), kTensorThreads,
               kSharedBytes, target.stream, params.table, squares, ratio, params.skip, params.trust);
    }
    launch("lars_step", lars_step_kernel, dim3(static_cast<unsigned>(params.chunks)), kTensorThreads, 0, target.stream,
           params.table, params.tensors, params.trusted, ratio, params.grad_scale, params.skip, params.lr,
           params.momentum, params.weight_decay);
}

}  // namespace caco
