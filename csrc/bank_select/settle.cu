// The end of bank_select: settles near ties in f32. Legend: S splits, R rows, K bank rows, C channels.
#include "../tiles/rows.cuh"
#include "bank_select.h"

namespace caco {
namespace {

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
    // Two scores of rounded operands are each off by at most 2 rounding |k| (Cauchy-Schwarz; a little more for the sum
    // and for what Comparison rounds).
    const float threshold = best_score - 4.1f * rounding * kUnits;

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

}  // namespace

void settle_select(const SelectParams &params, int splits, const Target &target) {
    // Half the distance between neighbouring operands near 1: the relative error of rounding.
    const float rounding = params.type == OperandType::kBfloat16 ? 1.f / 256 : 1.f / 2048;
    for_padded_channels(params.channels, [&](auto padded) {
        launch("bank_select settle", settle_kernel<padded()>, warp_rows_grid(params.rows), kRowThreads, 0,
               target.stream, static_cast<const BestTwo *>(params.workspace), params.exact_keys, params.exact_bank,
               params.index, params.similarity, params.rows, splits, params.channels, rounding);
    });
}

}  // namespace caco
