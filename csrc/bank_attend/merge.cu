// The end of bank_attend: merges what the splits of the bank have summed up. Legend: S splits, R rows, C channels,
// P padded channels.
#include "../tiles/rows.cuh"
#include "bank_attend.h"

namespace caco {
namespace {

// lse = m / t + log sum_s l_s exp((m_s - m) / t), m = max_s m_s; mean row = sum_s O_s exp((m_s - m) / t) / the same
// sum. One warp per row and 32 channels. The order of additions is fixed, so the result does not depend on which block
// ended first. The time is that of loads one after another, so a lane holds the statistics of two splits, and the sums
// of eight splits are under way at once.
__global__ void __launch_bounds__(kRowThreads)
    merge_kernel(const float *__restrict__ sums,                // [S, R, P]
                 const RowStatistics *__restrict__ statistics,  // [S, R]
                 float *__restrict__ lse,                       // [temperatures, R]
                 float *__restrict__ mean_row,                  // [R, C]
                 int64_t rows, int splits, int padded, int channels, int temperatures, float2 temperature) {
    constexpr int kHeld = kMaxSplits / 32, kTogether = 8;
    const int lane = threadIdx.x % 32, channel = 32 * blockIdx.y + lane;
    const int64_t at = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
    if (at >= rows) return;
    const float scale0 = kLog2E / temperature.x, scale1 = kLog2E / temperature.y;
    RowStatistics part[kHeld];
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        const int s = lane + 32 * i;
        part[i] = s < splits ? statistics[s * rows + at] : RowStatistics{-INFINITY, {0.f, 0.f}, 0.f};
        maximum = fmaxf(maximum, part[i].maximum);
    }
    maximum = warp_max(maximum);
    float factor[kHeld], total0 = 0.f, total1 = 0.f;
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        factor[i] = exp2f((part[i].maximum - maximum) * scale0);
        total0 = fmaf(part[i].sum[0], factor[i], total0);
        total1 = fmaf(part[i].sum[1], exp2f((part[i].maximum - maximum) * scale1), total1);
    }
    total0 = warp_sum(total0), total1 = warp_sum(total1);

    float mean = 0.f;
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        for (int first = 32 * i; first < splits && first < 32 * (i + 1); first += kTogether) {
            float sum[kTogether];
#pragma unroll
            for (int j = 0; j < kTogether; j++) {
                sum[j] = first + j < splits ? sums[((first + j) * rows + at) * padded + channel] : 0.f;
            }
#pragma unroll
            for (int j = 0; j < kTogether; j++) {
                mean = fmaf(sum[j], __shfl_sync(kFullWarp, factor[i], (first + j) % 32), mean);
            }
        }
    }
    if (channel < channels) mean_row[at * channels + channel] = mean / total0;
    if (channel != 0) return;
    lse[at] = maximum / temperature.x + logf(total0);
    if (temperatures == 2) lse[rows + at] = maximum / temperature.y + logf(total1);
}

}  // namespace

void merge_attend(const AttendParams &params, int splits, const Target &target) {
    const int padded = padded_channels(params.channels);
    const float *sums = static_cast<const float *>(params.workspace);
    const auto *statistics = reinterpret_cast<const RowStatistics *>(sums + splits * params.rows * padded);
    const float2 temperature = make_float2(params.temperature[0], params.temperature[params.temperatures - 1]);
    const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, kRowWarps)), padded / 32);
    launch("bank_attend merge", merge_kernel, grid, kRowThreads, 0, target.stream, sums, statistics, params.lse,
           params.mean_row, params.rows, splits, padded, params.channels, params.temperatures, temperature);
}

}  // namespace caco
