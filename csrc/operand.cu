// bank_operand: f32 rows become rows of a matrix operand. Legend: N rows, C channels, P padded channels.
#include "bank.h"
#include "tiles/rows.cuh"

namespace caco {
namespace {

// One warp per row. Bytes: reads 4 N C, writes 2 N P.
template <class T, int kPadded>
__global__ void __launch_bounds__(kRowThreads) operand_kernel(const float *__restrict__ rows,  // [N, C]
                                                              T *__restrict__ operand,         // [N, P]
                                                              int64_t count, int channels, bool normalise) {
    const int lane = threadIdx.x % 32;
    const int64_t at = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
    if (at >= count) return;
    Row<kPadded> row;
    row.load(rows + at * channels, channels, lane);
    row.store_operand(operand + at * kPadded, normalise ? row.inverse_norm() : 1.f, lane);
}

}  // namespace

void bank_operand(const OperandParams &params, const Target &target) {
    const DeviceScope scope(target.device);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        using T = decltype(operand);
        launch("bank_operand", operand_kernel<T, padded()>, warp_rows_grid(params.count), kRowThreads, 0, target.stream,
               params.rows, static_cast<T *>(params.operand), params.count, params.channels, params.normalise);
    });
}

}  // namespace caco
