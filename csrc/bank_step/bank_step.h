// bank_step: what its paths share, and what each of them defines.
#pragma once
#include "../bank.h"

namespace caco {

// Step's workspace: one factor for all rows, then per row (padded to kRowTermsPad with rows of weight 0) what the tile
// loop needs: p a = exp2(s log2(e) / t + shift) weight, in units of `factor`.
struct RowTerms {
    float shift, weight;
};
constexpr int kRowTermsPad = 384;    // a multiple of every path's tile of queries
constexpr int kRowTermsOffset = 16;  // bytes; where the rows begin
constexpr int64_t padded_rows(int64_t rows) { return (rows + kRowTermsPad - 1) / kRowTermsPad * kRowTermsPad; }
constexpr int64_t step_workspace(int64_t rows) {
    return kRowTermsOffset + padded_rows(rows) * int64_t(sizeof(RowTerms));
}
void step_row_terms(const StepParams &params, const Target &target);

// What each path defines in its file of this folder, for dispatch.cu.
template <Path kPath>
struct BankStep {
    static int shared_bytes(int channels);
    static void enqueue(const StepParams &params, const Target &target);
};

}  // namespace caco
