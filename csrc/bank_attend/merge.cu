// The end of bank_attend: merges what the splits of the bank have summed up. Legend: S splits, R rows, C channels,
// P padded channels.
#include "../tiles/rows.cuh"
#include "bank_attend.h"

namespace caco {
namespace {

// lse = m / t + log sum_s l_s exp((m_s - m) / t), m = max_s m_s; mean row = sum_s O_s exp((m_s - m) / t) / the same
// sum. One warp per row; splits are added in order, so the result does not depend on which block ended first.
template <int kPadded>
__global__ void __launch_bounds__(kRowThreads)
    merge_kernel(const float *__restrict__ sums,                // [S, R, P]
                 const RowStatistics *__restrict__ statistics,  // [S, R]
                 float *__restrict__ lse,                       // [temperatures, R]
                 float *__restrict__ mean_row,                  // [R, C]
                 int64_t rows, int splits, int channels, int temperatures, float2 temperature) {
    const int lane = threadIdx.x % 32;
    const int64_t at = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
    if (at >= rows) return;
    float maximum = -INFINITY;
    for (int s = 0; s < splits; s++) maximum = fmaxf(maximum, statistics[s * rows + at].maximum);
    const float scale0 = kLog2E / temperature.x, scale1 = kLog2E / temperature.y;
    float total0 = 0.f, total1 = 0.f;
    Row<kPadded> mean;
#pragma unroll
    for (float &value : mean.value) value = 0.f;
    for (int s = 0; s < splits; s++) {
        const RowStatistics part = statistics[s * rows + at];
        const float factor0 = exp2f((part.maximum - maximum) * scale0);
        total0 = fmaf(part.sum[0], factor0, total0);
        total1 = fmaf(part.sum[1], exp2f((part.maximum - maximum) * scale1), total1);
        Row<kPadded> sum;
        sum.load(sums + (s * rows + at) * kPadded, kPadded, lane);
#pragma unroll
        for (int i = 0; i < mean.kValues; i++) mean.value[i] = fmaf(sum.value[i], factor0, mean.value[i]);
    }
#pragma unroll
    for (float &value : mean.value) value /= total0;
    mean.store(mean_row + at * channels, channels, lane);
    if (lane != 0) return;
    lse[at] = maximum / temperature.x + logf(total0);
    if (temperatures == 2) lse[rows + at] = maximum / temperature.y + logf(total1);
}

}  // namespace

void merge_attend(const AttendParams &params, int splits, const Target &target) {
    for_padded_channels(params.channels, [&](auto padded) {
        const float *sums = static_cast<const float *>(params.workspace);
        const auto *statistics = reinterpret_cast<const RowStatistics *>(sums + splits * params.rows * padded());
        const float2 temperature = make_float2(params.temperature[0], params.temperature[params.temperatures - 1]);
        launch("bank_attend merge", merge_kernel<padded()>, warp_rows_grid(params.rows), kRowThreads, 0, target.stream,
               sums, statistics, params.lse, params.mean_row, params.rows, splits, params.channels, params.temperatures,
               temperature);
    });
}

}  // namespace caco
