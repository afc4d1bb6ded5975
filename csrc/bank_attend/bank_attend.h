// bank_attend: what its paths share, and what each of them defines.
#pragma once
#include "../bank.h"
#include "../tiles/split.cuh"

namespace caco {

// Attend's workspace: per split and row the sum of p u, unnormalised, then the row's statistics.
struct RowStatistics {
    float maximum;  // of s_ij over the split
    float sum[2];   // of exp((s_ij - maximum) / t), one per temperature
    float unused;
};
constexpr int64_t attend_workspace(int64_t rows, int channels, int splits) {
    return splits * rows * (int64_t(padded_channels(channels)) * sizeof(float) + sizeof(RowStatistics));
}
void merge_attend(const AttendParams &params, int splits, const Target &target);

// What each path defines in its file of this folder, for dispatch.cu. `multiprocessors` is that of the Target.
template <Path kPath>
struct BankAttend {
    static Split split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors);
    static int shared_bytes(int channels);
    static void enqueue(const AttendParams &params, const Target &target);
};

}  // namespace caco
