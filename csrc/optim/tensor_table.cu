// The device's table of where the tensors of some lists stand.
#include "../primitives.cuh"
#include "optim.h"

namespace caco {
namespace {

// Kernel parameters may be 4 KB.
constexpr int kRecordsPerLaunch = 96;
struct RecordBatch {
    TensorRecord records[kRecordsPerLaunch];
};
static_assert(sizeof(RecordBatch) + 16 <= 4096);

__global__ void __launch_bounds__(kRecordsPerLaunch)
    tensor_table_kernel(const __grid_constant__ RecordBatch batch, TensorRecord *__restrict__ to, int count) {
    const int at = threadIdx.x;
    if (at < count) to[at] = batch.records[at];
}

}  // namespace

void write_tensor_table(const TensorTableParams &params, const Target &target) {
    const DeviceScope scope(target.device);
    RecordBatch batch{};
    int64_t chunk = 0;
    int held = 0;
    for (int at = 0; at <= params.tensors; at++) {
        TensorRecord &record = batch.records[held++];
        record.first_chunk = chunk;
        record.count = at < params.tensors ? params.counts[at] : 0;
        for (int list = 0; list < kMaxLists; list++) {
            const bool given = at < params.tensors && list < params.lists;
            const uint64_t address = given ? params.addresses[int64_t(list) * params.tensors + at] : 0;
            record.address[list] = reinterpret_cast<float *>(address);
        }
        chunk += tensor_chunks(record.count);
        if (held < kRecordsPerLaunch && at < params.tensors) continue;
        launch("tensor table", tensor_table_kernel, dim3(1), kRecordsPerLaunch, 0, target.stream, batch,
               params.table + (at + 1 - held), held);
        held = 0;
    }
}

}  // namespace caco
