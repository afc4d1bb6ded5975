// bank_step on the tiles of ../tiles/tile.cuh: g_j = -1 / (t |w_j|) sum_i a_i c_ij (q_i - s_ij u_j),
// V <- mu V + g + wd W, W <- W - eta V.
//
// Tile map   grid (bank tiles); a block owns kRows bank rows, so nothing is shared between blocks and no atomics are
//            needed. The unit rows are made from the f32 bank in shared memory and stay; the queries stream past as
//            keys and values in tiles of kColumns. G = sum_i a_i p_ij q_i stays in registers, then goes through shared
//            memory (the tiles' room, 8 of each warp's 16 rows at a time), where the positives are added
//            (positives.cuh) and a warp can finish whole rows (row.cuh).
// Weights    2^14 a_i p_ij / max |a| in operand type, as one exp2 of s log2(e) / t + shift_i and one product; lse is
//            given, so no maximum is needed.
// Bytes      reads 4 K C of the bank twice and of the velocity once, writes both once and 2 K P of operand; 2 R P of
//            queries and 8 R M of positives per block from the L2 cache.
// Flop       4 R K P (6 R K P at P = 512). Limits: K < 2^31; C <= 512; M <= 8; R M < 2^30; |q| below 6e4 in fp16; lse
//            not smaller than the true one by more than 0.6 in fp16.
#pragma once
#include "../tiles/tile.cuh"
#include "bank_step.h"
#include "positives.cuh"
#include "row.cuh"

namespace caco {

template <class Tile>
struct StepShape {
    static constexpr int kTermsBytes = Tile::kColumns * int(sizeof(RowTerms));  // per stage
    static constexpr int kListAt = Tile::kTileBytes + Tile::kStages * kTermsBytes;
    static constexpr int kSharedBytes = kListAt + int(sizeof(PositiveList));
    // Rows of the bank that a warp finishes at once, as many as its registers hold.
    static constexpr int kRowsAtOnce = Tile::kLoadsAhead && Tile::kPadded < 512 ? 2 : 1;
    static_assert(Tile::kRows / 2 % (Tile::kWarps * kRowsAtOnce) == 0, "each warp finishes the same number of rows");
    // A row of the staged accumulator; 8 more floats send the four rows of a store phase to different banks.
    static constexpr int kStagedFloats = Tile::kPadded + 8;
    static_assert(Tile::kRows / 2 * kStagedFloats * 4 <= Tile::kTileBytes,
                  "half of the accumulator fits the tiles' room");
    static_assert(kSharedBytes <= Tile::kMostBytes, "the path's smallest GPU has no more per block");
    static_assert(kRowTermsPad % Tile::kColumns == 0, "a tile of row terms is never ragged");
    static_assert(kTermsBytes % 16 == 0 && kTermsBytes / 16 <= Tile::kThreads, "one copy per thread");
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) step_kernel(StepParams params) {
    if constexpr (Tile::kCompiled) {
        using T = typename Tile::T;
        using Shape = StepShape<Tile>;
        constexpr int kPadded = Tile::kPadded;
        char *memory = shared_memory();
        const Tile tile(memory);
        // From lane 0, so that the compiler knows it to be the same in the whole warp.
        const int warp = __shfl_sync(kFullWarp, int(threadIdx.x) / 32, 0);
        const int64_t first_row = int64_t(blockIdx.x) * Tile::kRows;
        const char *terms = static_cast<const char *>(params.workspace) + kRowTermsOffset;
        auto terms_stage = [&](int64_t t) {
            return memory + Tile::kTileBytes + (t % Tile::kStages) * Shape::kTermsBytes;
        };

        const int64_t end = first_row + Tile::kRows < params.bank_rows ? first_row + Tile::kRows : params.bank_rows;
        const int rows = int(end - first_row);
        PositiveList &list = *reinterpret_cast<PositiveList *>(memory + Shape::kListAt);
        if (warp == 0) find_positives<4>(params, list, 0, first_row, rows, tile.lane);

        using Operands = typename Row<kPadded>::Operands;
        auto store = [&](int row, int channel, const Operands &operands) {
            T *to = tile.resident + Tile::offset(row, channel / 8) + channel % 8;
            *reinterpret_cast<Operands *>(to) = operands;  // read after the first tile's barrier
        };
        make_unit_rows<T, kPadded, Tile::kRows, Tile::kWarps, 4>(params, first_row, warp, tile.lane, store);

        typename Tile::Accumulator o;
#pragma unroll
        for (auto &fragment : o) {
#pragma unroll
            for (float &value : fragment) value = 0.f;
        }
        const float scale = kLog2E / params.temperature;
        auto load = [&](int64_t t, T *stage, auto copy) {
            Tile::template load<Tile::kColumns>(copy, stage, static_cast<const T *>(params.queries), t * Tile::kColumns,
                                                params.rows);
            if (threadIdx.x < Shape::kTermsBytes / 16) {
                copy(Tile::kCopies, terms_stage(t) + 16 * threadIdx.x,
                     terms + t * Shape::kTermsBytes + 16 * threadIdx.x, true);
            }
        };
        tile.stream(0, ceil_div(params.rows, Tile::kColumns), load, [&](int64_t t, const T *stage) {
            typename Tile::Scores s;
            tile.scores(s, stage);
            const RowTerms *column_terms = reinterpret_cast<const RowTerms *>(terms_stage(t));
#pragma unroll
            for (int n = 0; n < Tile::kColumns / 8; n++) {
                const float4 two = *reinterpret_cast<const float4 *>(column_terms + tile.column(n, 0));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    s[n][2 * half] = fast_exp2(fmaf(s[n][2 * half], scale, two.x)) * two.y;
                    s[n][2 * half + 1] = fast_exp2(fmaf(s[n][2 * half + 1], scale, two.z)) * two.w;
                }
            }
            tile.accumulate(o, s, stage);
        });

        const float factor = *static_cast<const float *>(params.workspace);
        const StepRate rate(params);
        const int total = int(params.rows) * params.positives;
        float *staged = reinterpret_cast<float *>(memory);  // [kRows / 2, kStagedFloats]
        auto weigh_list = [&] {
            weigh_positives<T, kPadded, 4>(params, list, first_row, warp, Tile::kWarps, tile.lane);
            __syncthreads();
        };
        auto next_list = [&](int from) {
            __syncthreads();
            if (warp == 0) find_positives<4>(params, list, from, first_row, rows, tile.lane);
            __syncthreads();
            weigh_list();
        };
        weigh_list();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (list.from != 0) next_list(0);  // the first half needed several
#pragma unroll
            for (int n = 0; n < Tile::kGroupChannels / 8; n++) {
                *reinterpret_cast<float2 *>(staged + tile.half_row() * Shape::kStagedFloats + tile.channel(n, 0)) =
                    make_float2(o[n][2 * half] * factor, o[n][2 * half + 1] * factor);
            }
            __syncthreads();
            auto place = [&](int row) { return Tile::half_of(row) == half ? Tile::half_row_of(row) : -1; };
            while (true) {
                add_positives<T, kPadded, 8>(params, list, staged, Shape::kStagedFloats, int(threadIdx.x),
                                             Tile::kThreads, place);
                const int next = list.next;
                if (next >= total) break;
                next_list(next);
            }
            __syncthreads();

            constexpr int kAtOnce = Shape::kRowsAtOnce, kTurn = Tile::kWarps * kAtOnce;
            auto rows_from = [&](int r) {
                return [=](int n) { return first_row + Tile::row_of(r + n * Tile::kWarps, half); };
            };
            RowsBefore<kPadded, kAtOnce> before, next;
            if constexpr (Tile::kLoadsAhead) next.load(params, rate, rows_from(warp), end, tile.lane);
#pragma unroll 1
            for (int r = warp; r < Tile::kRows / 2; r += kTurn) {
                if constexpr (Tile::kLoadsAhead) {
                    before = next;
                    const bool more = r + kTurn < Tile::kRows / 2;
                    next.load(params, rate, rows_from(r + kTurn), more ? end : 0, tile.lane);
                } else {
                    before.load(params, rate, rows_from(r), end, tile.lane);
                }
                Row<kPadded> pulled[kAtOnce];
#pragma unroll
                for (int n = 0; n < kAtOnce; n++) {
                    pulled[n].load(staged + (r + n * Tile::kWarps) * Shape::kStagedFloats, kPadded, tile.lane, true);
                }
                step_rows<T>(params, rate, before, pulled, rows_from(r), end, tile.lane);
            }
            __syncthreads();
        }
    }
}

template <class Tile>
void launch_step(const StepParams &params, const Target &target) {
    const dim3 grid(static_cast<unsigned>(ceil_div(params.bank_rows, Tile::kRows)));
    launch("bank_step", step_kernel<Tile>, grid, Tile::kThreads, StepShape<Tile>::kSharedBytes, target.stream, params);
}

}  // namespace caco
