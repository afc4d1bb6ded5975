// What every path does before and after its own tile loop: the split of the bank, its merge, the settling of near ties,
// the per-row terms of a step.
#pragma once
#include "bank.h"
#include "primitives.cuh"

namespace caco {

// Probabilities are kept times 2^14 in operand type: half precision then holds them down to 2^-38 of the largest, and a
// largest of 1, or of 1.9 where a given lse is that far off, stays below its 65504.
constexpr float kProbabilityScaleLog2 = 14.f;

// The bank cut into `splits` runs of `tiles` column tiles each; every run has at least one tile.
struct Split {
    int splits, tiles;
};
Split split_bank(int64_t rows, int64_t bank_rows, int tile_rows, int tile_columns, int multiprocessors);

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

// Select's workspace: per split, row and list the best two by low-precision score, lower index first on ties. A list is
// the columns that one of the four lanes of a row sees.
constexpr int kListsPerRow = 4;
struct BestTwo {
    float score[2];
    int index[2];  // -1: none
};
constexpr int64_t select_workspace(int64_t rows, int splits) {
    return splits * rows * kListsPerRow * int64_t(sizeof(BestTwo));
}
void settle_select(const SelectParams &params, int splits, const Target &target);

// Step's workspace: one factor for all rows, then per row (padded to kRowTermsPad with rows of weight 0) what the tile
// loop needs: p a = exp2(s log2(e) / t + shift) weight, in units of `factor`.
struct RowTerms {
    float shift, weight;
};
constexpr int kRowTermsPad = 384;       // a multiple of every path's tile of queries
constexpr int kRowTermsOffset = 16;     // bytes; where the rows begin
constexpr int64_t padded_rows(int64_t rows) { return (rows + kRowTermsPad - 1) / kRowTermsPad * kRowTermsPad; }
constexpr int64_t step_workspace(int64_t rows) {
    return kRowTermsOffset + padded_rows(rows) * int64_t(sizeof(RowTerms));
}
void step_row_terms(const StepParams &params, const Target &target);

}  // namespace caco
