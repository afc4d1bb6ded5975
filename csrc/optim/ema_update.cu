// g <- g + w (f - g) over a list of tensors.
#include "tensors.cuh"

namespace caco {
namespace {

// One block per chunk. Bytes: reads 8, writes 4 per element. Limits: 2^31 - 1 chunks. The two forms are torch.lerp's:
// each is exact at its end, w = 0 and w = 1.
__global__ void __launch_bounds__(kTensorThreads) ema_update_kernel(const TensorRecord *__restrict__ table,  // [T + 1]
                                                                    int tensors, const float *__restrict__ skip,
                                                                    const float *__restrict__ device_weight) {
    if (is_set(skip)) return;
    const float weight = *device_weight;
    const Chunk chunk = chunk_of<2>(table, tensors, blockIdx.x);
    for_fours(chunk, [&](int i) {
        Four average, value;
        average.load(chunk.address[0], i, chunk);
        value.load(chunk.address[1], i, chunk);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float distance = value.value[k] - average.value[k];
            average.value[k] = weight < 0.5f ? fmaf(weight, distance, average.value[k])
                                             : fmaf(weight - 1.f, distance, value.value[k]);
        }
        average.store(chunk.address[0], i, chunk);
    });
}

}  // namespace

void ema_update(const EmaUpdateParams &params, const Target &target) {
    if (params.chunks == 0) return;
    const DeviceScope scope(target.device);
    launch("ema_update", ema_update_kernel, dim3(static_cast<unsigned>(params.chunks)), kTensorThreads, 0,
           target.stream, params.table, params.tensors, params.skip, params.weight);
}

}  // namespace caco
