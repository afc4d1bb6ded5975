// The comparison of bank_select: the best two columns that a lane sees of one row.
//
// A score becomes an integer in a float, 32 q + code: q is the score in steps of 2^-18 |k|, rounded, and code says which
// of the lane's at most 32 columns of the tile it is, the lower the column the larger. So a maximum of floats keeps
// score and column together, equal scores go to the lower column whatever their sign, and -infinity and NaN never win.
//
// Cost per score: 3 instructions of the multiply-add pipe to pack, 3 of the ALU to compare, no branch. Rounding adds
// 2^-18 |k| to what settle_select allows for, which is a twelfth of its spare 0.1 roundings of fp16.
#pragma once
#include "../tiles/rows.cuh"
#include "bank_select.h"

namespace caco {

struct Comparison {
    static constexpr int kCodes = 32;
    // One rounding to a multiple of kCodes: what is added to it has steps of kCodes.
    static constexpr float kRoundToCodes = 1.5f * (1 << 23) * kCodes;

    float units;  // per unit of score: kUnits / |k|, and 0 if k is 0
    BestTwo best = {{-INFINITY, -INFINITY}, {-1, -1}};

    __device__ __forceinline__ explicit Comparison(float square)  // |k|^2
        : units(square > 0.f ? kUnits / sqrtf(square) : 0.f) {}

    // Compares the scores of a tile: elements `2 half` and `2 half + 1` of fragment n are of columns `column + 8 n` and
    // the next. Tiles come in ascending order.
    template <int kFragments>
    __device__ __forceinline__ void add(const float (&s)[kFragments][4], int half, int column) {
        static_assert(2 * kFragments <= kCodes);
        float first = -INFINITY, second = -INFINITY;
#pragma unroll
        for (int n = 0; n < kFragments; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float rounded = fmaf(s[n][2 * half + e], units, kRoundToCodes) - kRoundToCodes;
                const float packed = rounded + float(kCodes - 1 - (2 * n + e));
                second = fminf(first, fmaxf(second, packed));  // in this order NaN leaves both as they are
                first = fmaxf(first, packed);
            }
        }
        insert(first, column);
        insert(second, column);
    }

   private:
    // A strict comparison of scores without codes keeps the earlier column on ties.
    __device__ __forceinline__ void insert(float packed, int column) {
        const int code = static_cast<int>(packed) & (kCodes - 1), place = kCodes - 1 - code;
        const float score = packed - float(code);
        column += 8 * (place / 2) + place % 2;
        const bool above_first = score > best.score[0], above_second = score > best.score[1];
        best.index[1] = above_first ? best.index[0] : above_second ? column : best.index[1];
        best.index[0] = above_first ? column : best.index[0];
        best.score[1] = fminf(best.score[0], fmaxf(best.score[1], score));
        best.score[0] = fmaxf(best.score[0], score);
    }
};

// The sum of squares of eight neighbouring operands.
template <class T>
__device__ __forceinline__ float square_of_chunk(const T *operands) {
    const uint4 words = *reinterpret_cast<const uint4 *>(operands);
    float square = 0.f;
#pragma unroll
    for (const uint32_t both : {words.x, words.y, words.z, words.w}) {
        const float2 pair = unpack<T>(both);
        square = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, square));
    }
    return square;
}

// |k|^2 of a row of P operands whose four lanes, `lane_step` apart, call this together: chunk(i) is where chunk i of the
// row begins, `list` which of the four this lane is. All four get the same bits.
template <class T, int kPadded, class Chunk>
__device__ __forceinline__ float square_of_row(int list, int lane_step, Chunk &&chunk) {
    float square = 0.f;
    for (int i = list; i < kPadded / 8; i += 4) square += square_of_chunk<T>(chunk(i));
    square += __shfl_xor_sync(kFullWarp, square, lane_step);
    return square + __shfl_xor_sync(kFullWarp, square, 2 * lane_step);
}

}  // namespace caco
