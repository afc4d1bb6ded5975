// The end of a bank step for one row, the same on every path: positives, tangent, velocity, row, operand copy.
#pragma once
#include "../tiles/rows.cuh"

namespace caco {

// The first place in keys [count], ascending, whose key is not less than `key`. A warp searches together, 32 probes a
// round.
__device__ __forceinline__ int64_t warp_lower_bound(const int64_t *__restrict__ keys, int64_t count, int64_t key,
                                                    int lane) {
    int64_t low = 0, high = count;  // keys before low are less, keys from high on are not
    while (low < high) {
        const int64_t step = (high - low + 31) / 32, at = low + (lane + 1) * step - 1;
        const unsigned less = __ballot_sync(kFullWarp, at < high && keys[at] < key);
        low += __popc(less) * step;
        high = low + step - 1 < high ? low + step - 1 : high;
    }
    return low;
}

struct Span {
    int64_t begin, end;
};

// The places in positive_row of the bank rows first .. last - 1.
__device__ __forceinline__ Span positives_of(const StepParams &params, int64_t first, int64_t last, int lane) {
    const int64_t count = params.rows * params.positives;
    return {warp_lower_bound(params.positive_row, count, first, lane),
            warp_lower_bound(params.positive_row, count, last, lane)};
}

// A row of bank and velocity before the step, by one warp: loaded apart from step_row, so that the memory is waited for
// while the row before is finished. Rows from `end` on read as zeros.
template <int kPadded>
struct RowBefore {
    Row<kPadded> row, speed;

    __device__ __forceinline__ void load(const StepParams &params, int64_t j, int64_t end, int lane) {
        const int channels = j < end ? params.channels : 0;
        row.load(params.bank + j * params.channels, channels, lane);
        speed.load(params.velocity + j * params.channels, channels, lane);
    }
};

// Row j of bank and velocity, by one warp. `pulled` is sum_i a_i p_ij q_i; `span` covers at least row j's positives.
//
// c_ij differs from p_ij in the R M pairs of a row and its positives only; their share a_i o_im (1 - 2 p_ij) q_i is
// added here in f32, in ascending order of i. As s_ij = q_i . u_j, the tangent sum_i a_i c_ij (q_i - s_ij u_j) is G -
// (G . u) u.
template <class T, int kPadded>
__device__ __forceinline__ void step_row(const StepParams &params, int64_t j, const RowBefore<kPadded> &before,
                                         Row<kPadded> pulled, Span span, int lane) {
    float *bank = params.bank + j * params.channels, *velocity = params.velocity + j * params.channels;
    Row<kPadded> row = before.row, speed = before.speed;
    const float inverse_norm = row.inverse_norm();
    if (params.skip != nullptr && *params.skip != 0.f) {
        if (params.bank_operand == nullptr) return;
        return row.store_operand(static_cast<T *>(params.bank_operand) + j * kPadded, inverse_norm, lane);
    }
    Row<kPadded> unit;
#pragma unroll
    for (int c = 0; c < row.kValues; c++) unit.value[c] = row.value[c] * inverse_norm;

    for (int64_t first = span.begin; first < span.end; first += 32) {
        const bool mine = first + lane < span.end && params.positive_row[first + lane] == j;
        for (unsigned left = __ballot_sync(kFullWarp, mine); left != 0; left &= left - 1) {
            const int64_t place = params.positive_place[first + __ffs(left) - 1];
            const int64_t i = place / params.positives;
            Row<kPadded> query;
            query.load(params.exact_queries + i * params.channels, params.channels, lane);
            const float p = expf(query.dot(unit) / params.temperature - params.lse[i]);
            const float pull = params.row_weight[i] * params.positive_weight[place] * (1.f - 2.f * p);
#pragma unroll
            for (int c = 0; c < row.kValues; c++) pulled.value[c] = fmaf(pull, query.value[c], pulled.value[c]);
        }
    }

    const float along = pulled.dot(unit), scale = -inverse_norm / params.temperature, lr = *params.lr;
#pragma unroll
    for (int c = 0; c < row.kValues; c++) {
        const float gradient = scale * (pulled.value[c] - along * unit.value[c]);
        speed.value[c] = fmaf(params.momentum, speed.value[c], gradient);
        row.value[c] = fmaf(-lr, speed.value[c], row.value[c]);
    }
    if (params.project) {
        const float rescale = row.inverse_norm();
#pragma unroll
        for (int c = 0; c < row.kValues; c++) row.value[c] *= rescale;
    }
    speed.store(velocity, params.channels, lane);
    row.store(bank, params.channels, lane);
    if (params.bank_operand == nullptr) return;
    row.store_operand(static_cast<T *>(params.bank_operand) + j * kPadded, row.inverse_norm(), lane);
}

}  // namespace caco
