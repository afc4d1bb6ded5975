// The positives of a block's rows of the bank, for bank_step on every path.
//
// c_ij differs from p_ij in the R M pairs of a row and its positives only. Their share a_i o_im (1 - 2 p_ij) q_i is
// added to G in f32 and in ascending order of i, so the result does not depend on who found them or when.
//
// Nothing is sorted beforehand: one warp of each block goes through all R M entries in order and lists those of the
// block's rows in shared memory. Then each listed positive gets its weight from one warp, and threads that own a
// channel each add the list to the rows. A block with more positives than a list holds, such as one with a row that all
// queries chose, goes on with the next list, so that its work is spread over all its warps.
#pragma once
#include "../tiles/rows.cuh"

namespace caco {

struct Positive {
    int query, row;  // i, and the row of the bank within the block
    float pull;      // a_i o_im, then times 1 - 2 p_ij
};

constexpr int kListed = 192;
constexpr int kFewPositives = 32;  // one warp can weigh so many while the others multiply

struct PositiveList {
    int from, next;  // the entries that were looked at, of the flattened [R, M]
    int count, unused;
    Positive entry[kListed];
};
static_assert(sizeof(PositiveList) % 16 == 0);

// Lists the positives of `rows` bank rows from `first` on, as many as fit, from entry `from` on. By one warp, with
// kAhead loads under way in each lane.
template <int kAhead>
__device__ __forceinline__ void find_positives(const StepParams &params, PositiveList &list, int from, int64_t first,
                                               int rows, int lane) {
    const int total = int(params.rows) * params.positives;
    int at = from, count = 0;
#pragma unroll 1
    for (; at < total && count <= kListed - 32 * kAhead; at += 32 * kAhead) {
        int row[kAhead];
#pragma unroll
        for (int n = 0; n < kAhead; n++) {
            const int place = at + 32 * n + lane;
            const int64_t j = place < total ? params.positive[place] : -1;
            row[n] = uint64_t(j - first) < unsigned(rows) ? int(j - first) : -1;
        }
#pragma unroll
        for (int n = 0; n < kAhead; n++) {
            const unsigned votes = __ballot_sync(kFullWarp, row[n] >= 0);
            if (row[n] >= 0) {
                const int place = at + 32 * n + lane, query = place / params.positives;
                list.entry[count + __popc(votes & ((1u << lane) - 1))] = {
                    query, row[n], params.row_weight[query] * params.positive_weight[place]};
            }
            count += __popc(votes);
        }
    }
    if (lane == 0) list.from = from, list.next = at < total ? at : total, list.count = count;
}

// The channels of query i, exact: in operand type if that is what the queries were given in, else in f32.
template <class T, int kPadded>
__device__ __forceinline__ const void *query_channels(const StepParams &params, int i) {
    if (params.exact_queries == nullptr) return static_cast<const T *>(params.queries) + int64_t(i) * kPadded;
    return params.exact_queries + int64_t(i) * params.channels;
}
template <class T>
__device__ __forceinline__ float query_at(const StepParams &params, const void *channels, int c) {
    return params.exact_queries == nullptr ? to_float(static_cast<const T *>(channels)[c])
                                           : static_cast<const float *>(channels)[c];
}

// Multiplies the pull of every listed positive by 1 - 2 p_ij, with the rows of the bank as they are before the step. By
// `warps` warps, each kAtOnce positives at a time.
template <class T, int kPadded, int kAtOnce>
__device__ __forceinline__ void weigh_positives(const StepParams &params, PositiveList &list, int64_t first_row,
                                                int warp, int warps, int lane) {
    const int count = list.count;
#pragma unroll 1
    for (int at = warp * kAtOnce; at < count; at += warps * kAtOnce) {
        const void *query[kAtOnce];
        const float *row[kAtOnce];
        float along[kAtOnce], square[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; n++) {
            const Positive &positive = list.entry[at + n < count ? at + n : at];
            query[n] = query_channels<T, kPadded>(params, positive.query);
            row[n] = params.bank + (first_row + positive.row) * params.channels;
            along[n] = square[n] = 0.f;
        }
        const bool mine = lane < kAtOnce && at + lane < count;
        const float lse = mine ? params.lse[list.entry[at + lane].query] : 0.f;
#pragma unroll(kAtOnce > 1 ? 4 : 1)
        for (int c = lane; c < params.channels; c += 32) {
#pragma unroll
            for (int n = 0; n < kAtOnce; n++) {
                const float w = row[n][c];
                along[n] = fmaf(query_at<T>(params, query[n], c), w, along[n]);
                square[n] = fmaf(w, w, square[n]);
            }
        }
        warp_sums(along);
        warp_sums(square);
        float s = 0.f;
#pragma unroll
        for (int n = 0; n < kAtOnce; n++) {
            if (lane == n) s = along[n] * inverse_root(square[n]);
        }
        if (mine) list.entry[at + lane].pull *= 1.f - 2.f * expf(s / params.temperature - lse);
    }
}

// Adds pull times query to the staged rows [., stride], where place(row) is that of a row of the block or below 0. By
// `threads` threads, each for channels of its own, with kAtOnce loads under way.
template <class T, int kPadded, int kAtOnce, class Place>
__device__ __forceinline__ void add_positives(const StepParams &params, const PositiveList &list, float *staged,
                                              int stride, int thread, int threads, Place &&place) {
    const int count = list.count;
#pragma unroll 1
    for (int c = thread; c < params.channels; c += threads) {
        int current = -1;
        float sum = 0.f;
#pragma unroll 1
        for (int at = 0; at < count; at += kAtOnce) {
            float query[kAtOnce];
#pragma unroll
            for (int n = 0; n < kAtOnce; n++) {
                query[n] = 0.f;
                if (at + n >= count) continue;
                query[n] = query_at<T>(params, query_channels<T, kPadded>(params, list.entry[at + n].query), c);
            }
#pragma unroll
            for (int n = 0; n < kAtOnce; n++) {
                const int to = at + n < count ? place(list.entry[at + n].row) : -1;
                if (to < 0) continue;
                if (to != current) {  // a row that many queries chose stays in a register
                    if (current >= 0) staged[current * stride + c] = sum;
                    current = to;
                    sum = staged[current * stride + c];
                }
                sum = fmaf(list.entry[at + n].pull, query[n], sum);
            }
        }
        if (current >= 0) staged[current * stride + c] = sum;
    }
}

}  // namespace caco
