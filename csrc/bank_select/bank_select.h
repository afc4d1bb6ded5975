// bank_select: what its paths share, and what each of them defines.
#pragma once
#include "../bank.h"
#include "../tiles/split.cuh"

namespace caco {

// Select's workspace: per split, row and list the best two by low-precision score, lower index first on ties. A list is
// the columns that one of the four lanes of a row sees.
constexpr int kListsPerRow = 4;
constexpr float kUnits = 1 << 23;  // that a score of |k| counts
struct BestTwo {
    float score[2];  // in |k| / kUnits
    int index[2];    // -1: none
};
constexpr int64_t select_workspace(int64_t rows, int splits) {
    return splits * rows * kListsPerRow * int64_t(sizeof(BestTwo));
}
void settle_select(const SelectParams &params, int splits, const Target &target);

// What each path defines in its file of this folder, for dispatch.cu. `multiprocessors` is that of the Target.
template <Path kPath>
struct BankSelect {
    static Split split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors);
    static int shared_bytes(int channels);
    static void enqueue(const SelectParams &params, const Target &target);
};

}  // namespace caco
