// The stages around the tile loops; see stages.h. Legend: S splits, R rows, P padded channels.
#include "stages.h"

#include <algorithm>

#include "rows.cuh"

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

// Every candidate whose low-precision score could be the best is compared by its f32 similarity; one warp per row.
template <int kPadded>
__global__ void __launch_bounds__(kRowThreads, 2)
    settle_kernel(const BestTwo *__restrict__ candidates,  // [S, R, lists]
                  const float *__restrict__ keys,          // [R, C]
                  const float *__restrict__ bank,          // [K, C]
                  int64_t *__restrict__ index,             // [R]
                  float *__restrict__ similarity,          // [R]
                  int64_t rows, int splits, int channels, float rounding) {
    const int lane = threadIdx.x % 32;
    const int64_t at = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
    if (at >= rows) return;
    const int lists = splits * kListsPerRow;
    auto candidate = [&](int list) {
        return candidates[(list / kListsPerRow * rows + at) * kListsPerRow + list % kListsPerRow];
    };

    float best_score = -INFINITY;
    for (int list = lane; list < lists; list += 32) best_score = fmaxf(best_score, candidate(list).score[0]);
    best_score = warp_max(best_score);
    Row<kPadded> key, row;
    key.load(keys + at * channels, channels, lane);
    // Two scores of rounded operands are each off by at most 2 rounding |k| (Cauchy-Schwarz; a little more for the
    // sum).
    const float threshold = best_score - 4.1f * rounding * sqrtf(key.dot(key));

    float best = -INFINITY;
    int best_index = -1;
    for (int first = 0; first < lists; first += 32) {
        const BestTwo two = first + lane < lists ? candidate(first + lane) : BestTwo{{-INFINITY, -INFINITY}, {-1, -1}};
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const bool near = two.index[which] >= 0 && two.score[which] >= threshold;
            for (unsigned left = __ballot_sync(kFullWarp, near); left != 0; left &= left - 1) {
                const int j = __shfl_sync(kFullWarp, two.index[which], __ffs(left) - 1);
                row.load(bank + int64_t(j) * channels, channels, lane);
                const float exact = key.dot(row) * row.inverse_norm();
                if (best_index < 0 || exact > best || (exact == best && j < best_index)) best = exact, best_index = j;
            }
        }
    }
    if (lane != 0) return;
    index[at] = best_index < 0 ? 0 : best_index;  // no candidate: every score was NaN
    similarity[at] = best_index < 0 ? NAN : best;
}

// shift_i = 14 - lse_i log2(e), weight_i = a_i / max |a|, factor = 2^-14 max |a|. One block.
constexpr int kTermsThreads = 256;
__global__ void __launch_bounds__(kTermsThreads) row_terms_kernel(const float *__restrict__ lse,         // [R]
                                                                  const float *__restrict__ row_weight,  // [R]
                                                                  RowTerms *__restrict__ terms,          // [R padded]
                                                                  float *__restrict__ factor,            // [1]
                                                                  int64_t rows, int64_t padded) {
    float *warp_maximum = reinterpret_cast<float *>(shared_memory());  // [warps]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float largest = 0.f;
    for (int64_t i = threadIdx.x; i < rows; i += kTermsThreads) largest = fmaxf(largest, fabsf(row_weight[i]));
    largest = warp_max(largest);
    if (lane == 0) warp_maximum[warp] = largest;
    __syncthreads();
    largest = 0.f;
    for (int w = 0; w < kTermsThreads / 32; w++) largest = fmaxf(largest, warp_maximum[w]);
    const float scale = largest > 0.f ? 1.f / largest : 0.f;
    for (int64_t i = threadIdx.x; i < padded; i += kTermsThreads) {
        const bool used = i < rows && row_weight[i] != 0.f;
        terms[i] =
            used ? RowTerms{kProbabilityScaleLog2 - lse[i] * kLog2E, row_weight[i] * scale} : RowTerms{-INFINITY, 0.f};
    }
    if (threadIdx.x == 0) *factor = largest * exp2f(-kProbabilityScaleLog2);
}

dim3 warp_rows_grid(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowWarps))); }

}  // namespace

Split split_bank(int64_t rows, int64_t bank_rows, int tile_rows, int tile_columns, int multiprocessors) {
    constexpr int64_t kMaxSplits = 64, kMinTiles = 4;
    const int64_t row_tiles = ceil_div(rows, tile_rows), bank_tiles = ceil_div(bank_rows, tile_columns);
    const int64_t most = std::clamp<int64_t>(bank_tiles / kMinTiles, 1, kMaxSplits);
    // The fewest splits that fill the multiprocessors' waves to within 5 % of the best.
    auto filled = [&](int64_t splits) {
        const int64_t blocks = row_tiles * splits;
        return double(blocks) / double(ceil_div(blocks, multiprocessors) * multiprocessors);
    };
    double best = 0;
    for (int64_t splits = 1; splits <= most; splits++) best = std::max(best, filled(splits));
    int64_t splits = 1;
    while (filled(splits) < 0.95 * best) splits++;
    const int64_t tiles = ceil_div(bank_tiles, splits);
    return {static_cast<int>(ceil_div(bank_tiles, tiles)), static_cast<int>(tiles)};
}

void bank_operand(const OperandParams &params, const Target &target) {
    const DeviceScope scope(target.device);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        using T = decltype(operand);
        launch("bank_operand", operand_kernel<T, padded()>, warp_rows_grid(params.count), kRowThreads, 0, target.stream,
               params.rows, static_cast<T *>(params.operand), params.count, params.channels, params.normalise);
    });
}

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

void settle_select(const SelectParams &params, int splits, const Target &target) {
    // Half the distance between neighbouring operands near 1: the relative error of rounding.
    const float rounding = params.type == OperandType::kBfloat16 ? 1.f / 256 : 1.f / 2048;
    for_padded_channels(params.channels, [&](auto padded) {
        launch("bank_select settle", settle_kernel<padded()>, warp_rows_grid(params.rows), kRowThreads, 0,
               target.stream, static_cast<const BestTwo *>(params.workspace), params.exact_keys, params.exact_bank,
               params.index, params.similarity, params.rows, splits, params.channels, rounding);
    });
}

void step_row_terms(const StepParams &params, const Target &target) {
    char *workspace = static_cast<char *>(params.workspace);
    launch("bank_step row terms", row_terms_kernel, dim3(1), kTermsThreads, int(kTermsThreads / 32 * sizeof(float)),
           target.stream, params.lse, params.row_weight, reinterpret_cast<RowTerms *>(workspace + kRowTermsOffset),
           reinterpret_cast<float *>(workspace), params.rows, padded_rows(params.rows));
}

}  // namespace caco
