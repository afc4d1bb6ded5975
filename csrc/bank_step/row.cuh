// What bank_step does with whole rows of the bank, the same on every path: unit rows before the tile loop; tangent,
// velocity, row and operand copy after it. A warp has several rows at once. One row after another would wait for
// each of its sums; here their steps run under each other.
#pragma once
#include "../tiles/rows.cuh"

namespace caco {

// |row|^-1 of each.
template <int kPadded, int kCount>
__device__ __forceinline__ void inverse_norms(float (&inverse)[kCount], const Row<kPadded> (&row)[kCount]) {
#pragma unroll
    for (int n = 0; n < kCount; n++) inverse[n] = row[n].part_of_dot(row[n]);
    warp_sums(inverse);
#pragma unroll
    for (float &value : inverse) value = inverse_root(value);
}

// Unit rows of the bank from first_row on in operand type, kRows of them by kWarps warps, kAtOnce at a time: calls
// store(row, channel, operands) for each group of neighbouring channels. Zeros beyond the bank.
template <class T, int kPadded, int kRows, int kWarps, int kAtOnce, class Store>
__device__ __forceinline__ void make_unit_rows(const StepParams &params, int64_t first_row, int warp, int lane,
                                               Store &&store) {
    static_assert(kRows % (kWarps * kAtOnce) == 0, "each warp makes the same number");
    const bool aligned = rows_are_aligned(params.bank, params.channels);
#pragma unroll 1
    for (int r = warp; r < kRows; r += kWarps * kAtOnce) {
        Row<kPadded> row[kAtOnce];
        float inverse[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; n++) {
            const int64_t j = first_row + r + n * kWarps;
            row[n].load(params.bank + j * params.channels, j < params.bank_rows ? params.channels : 0, lane, aligned);
        }
        inverse_norms(inverse, row);
#pragma unroll
        for (int n = 0; n < kAtOnce; n++) {
#pragma unroll
            for (int i = 0; i < row[n].kValues; i += row[n].kTogether) {
                store(r + n * kWarps, row[n].channel(i, lane), row[n].template operands<T>(i, inverse[n]));
            }
        }
    }
}

// What all rows share, read once.
struct StepRate {
    float lr, momentum, weight_decay, inverse_temperature;
    bool skip, aligned;

    __device__ __forceinline__ explicit StepRate(const StepParams &params)
        : lr(*params.lr),
          momentum(params.momentum),
          weight_decay(params.weight_decay),
          inverse_temperature(1.f / params.temperature),
          skip(params.skip != nullptr && *params.skip != 0.f),
          aligned(rows_are_aligned(params.bank, params.channels) &&
                  rows_are_aligned(params.velocity, params.channels)) {}
};

// kCount rows of bank and velocity before the step, by one warp: loaded apart from finish, so that the memory is waited
// for while the rows before are finished. The caller says which rows by row(n); those from `end` on read as zeros.
template <int kPadded, int kCount>
struct RowsBefore {
    Row<kPadded> row[kCount], speed[kCount];

    template <class RowAt>
    __device__ __forceinline__ void load(const StepParams &params, const StepRate &rate, RowAt &&row_at, int64_t end,
                                         int lane) {
#pragma unroll
        for (int n = 0; n < kCount; n++) {
            const int64_t j = row_at(n);
            const int channels = j < end ? params.channels : 0;
            row[n].load(params.bank + j * params.channels, channels, lane, rate.aligned);
            speed[n].load(params.velocity + j * params.channels, channels, lane, rate.aligned);
        }
    }
};

// Rows row_at(n) < end of bank and velocity, by one warp. `pulled` is G_j = sum_i a_i c_ij q_i.
//
// As s_ij = q_i . u_j, the tangent sum_i a_i c_ij (q_i - s_ij u_j) is G - (G . u) u. A row of zeros has the inverse norm 0,
// so its gradient is 0 and it stays.
template <class T, int kPadded, int kCount, class RowAt>
__device__ __forceinline__ void step_rows(const StepParams &params, const StepRate &rate,
                                          const RowsBefore<kPadded, kCount> &before, Row<kPadded> (&pulled)[kCount],
                                          RowAt &&row_at, int64_t end, int lane) {
    Row<kPadded> row[kCount];
    float inverse[kCount], along[kCount];
#pragma unroll
    for (int n = 0; n < kCount; n++) {
        row[n] = before.row[n];
        along[n] = pulled[n].part_of_dot(row[n]);
    }
    inverse_norms(inverse, row);
    if (!rate.skip) {
        warp_sums(along);
#pragma unroll
        for (int n = 0; n < kCount; n++) {
            const float scale = -inverse[n] * rate.inverse_temperature, of_row = along[n] * inverse[n] * inverse[n];
            Row<kPadded> speed = before.speed[n];
#pragma unroll
            for (int c = 0; c < row[n].kValues; c++) {
                const float gradient = scale * fmaf(-of_row, row[n].value[c], pulled[n].value[c]);
                const float change = fmaf(rate.weight_decay, row[n].value[c], gradient);
                speed.value[c] = fmaf(rate.momentum, speed.value[c], change);
                row[n].value[c] = fmaf(-rate.lr, speed.value[c], row[n].value[c]);
            }
            const int64_t j = row_at(n);
            if (j < end) speed.store(params.velocity + j * params.channels, params.channels, lane, rate.aligned);
        }
        if (params.project) {
            inverse_norms(inverse, row);
#pragma unroll
            for (int n = 0; n < kCount; n++) {
#pragma unroll
                for (float &value : row[n].value) value *= inverse[n];
            }
        }
#pragma unroll
        for (int n = 0; n < kCount; n++) {
            const int64_t j = row_at(n);
            if (j < end) row[n].store(params.bank + j * params.channels, params.channels, lane, rate.aligned);
        }
        if (params.bank_operand != nullptr) inverse_norms(inverse, row);
    }
    if (params.bank_operand == nullptr) return;
#pragma unroll
    for (int n = 0; n < kCount; n++) {
        const int64_t j = row_at(n);
        if (j < end) row[n].store_operand(static_cast<T *>(params.bank_operand) + j * kPadded, inverse[n], lane);
    }
}

}  // namespace caco
