// The beginning of bank_step: what its tile loop needs of each row of queries. Legend: R rows.
#include "../tiles/rows.cuh"
#include "bank_step.h"

namespace caco {
namespace {

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

}  // namespace

void step_row_terms(const StepParams &params, const Target &target) {
    char *workspace = static_cast<char *>(params.workspace);
    launch("bank_step row terms", row_terms_kernel, dim3(1), kTermsThreads, int(kTermsThreads / 32 * sizeof(float)),
           target.stream, params.lse, params.row_weight, reinterpret_cast<RowTerms *>(workspace + kRowTermsOffset),
           reinterpret_cast<float *>(workspace), params.rows, padded_rows(params.rows));
}

}  // namespace caco
