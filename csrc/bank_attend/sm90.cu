// bank_attend on wgmma and TMA: lse_i = log sum_j exp(s_ij / t), mean row O_i = sum_j softmax_j(s_ij / t) u_j.
//
// Tile map   grid (row tiles, splits), as on sm80; a block holds kRows queries and passes over its split's run of the
//            bank in tiles of kColumns rows, keys and values at once.
// Overlap    the scores of a tile and the second product of the tile before are both started, then the softmax of this
//            tile runs while the second product is under way. The two computing warpgroups are independent, so one's
//            softmax also runs during the other's products. While products are under way there must be no branch, or
//            the compiler waits for them there: so a run goes from its last tile, the only one that may be ragged, to
//            its first.
// Softmax    as on sm80: a running maximum per row, rescaling skipped by a warp-uniform branch once it has settled; p
//            enters the second product as 2^14 p in operand type; the sum is of the unrounded p.
// Bytes      reads 2 K P per row tile (from the L2 cache when several blocks share a split) and 2 R P; writes
//            4 R P splits of partial sums, which the merge reads again.
// Flop       4 R K P (6 R K P at P = 512, where both warpgroups compute the scores of the same rows).
// Limits     K < 2^31; C <= 512.
#include "../tiles/sm90.cuh"
#include "bank_attend.h"

namespace caco::sm90 {
namespace {

#ifdef CACO_SM90A

// What a thread knows of its two rows; columns are spread over the four lanes of a row.
template <class Tile, bool kTwoTemperatures>
struct Softmax {
    float scale0, scale1;  // log2(e) / t
    float maximum[2] = {-INFINITY, -INFINITY};
    float sum0[2] = {0.f, 0.f}, sum1[2] = {0.f, 0.f};  // over this lane's columns

    // Scores become 2^14 p, sums grow. Returns whether the maximum of a row of this warp has grown; what was summed up
    // before is then to be multiplied by `shrink`. hold(sums) keeps the compiler from moving instructions across it.
    template <class Hold>
    __device__ __forceinline__ bool update(typename Tile::Scores &s, float (&shrink)[2], Hold &&hold) {
        float larger[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            larger[half] = maximum[half];
#pragma unroll
            for (int n = 0; n < Tile::kColumns / 8; n++) {
                larger[half] = fmaxf(larger[half], fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            }
            larger[half] = fmaxf(larger[half], __shfl_xor_sync(kFullWarp, larger[half], 1));
            larger[half] = fmaxf(larger[half], __shfl_xor_sync(kFullWarp, larger[half], 2));
        }
        const bool grown = __any_sync(kFullWarp, larger[0] > maximum[0] || larger[1] > maximum[1]);
#pragma unroll
        for (int half = 0; half < 2; half++) {  // without a branch: products under way would be waited for
            shrink[half] = fast_exp2((maximum[half] - larger[half]) * scale0);
            sum0[half] *= shrink[half];
            if (kTwoTemperatures) sum1[half] *= fast_exp2((maximum[half] - larger[half]) * scale1);
            maximum[half] = larger[half];
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float shift0 = kProbabilityScaleLog2 - maximum[half] * scale0, shift1 = -maximum[half] * scale1;
#pragma unroll
            for (auto &fragment : s) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    if (kTwoTemperatures) sum1[half] += fast_exp2(fmaf(fragment[e], scale1, shift1));
                    fragment[e] = fast_exp2(fmaf(fragment[e], scale0, shift0));
                    sum0[half] += fragment[e];
                }
            }
        }
        finish_before_wait(s);
        hold((sum0[0] + sum0[1]) + (kTwoTemperatures ? sum1[0] + sum1[1] : 0.f));
        return grown;
    }
};

#endif

template <class Tile, bool kTwoTemperatures>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attend_kernel(const __grid_constant__ TensorMap queries,  // [R, P]
                  const __grid_constant__ TensorMap bank,     // [K, P]
                  float *__restrict__ sums,                   // [S, R, P]
                  RowStatistics *__restrict__ statistics,     // [S, R]
                  int64_t rows, int64_t bank_rows, int tiles_per_split, float scale0, float scale1) {
#ifdef CACO_SM90A
    const Tile tile(shared_memory());
    const Run<Tile> run(bank_rows, tiles_per_split);

    auto start_copies = [&] {
        tile.copy_resident(&queries, run.first_row);
        tile.template copy_stream<true>(&bank, run.first_tile, run.tiles);
    };
    auto compute = [&] {
        typename Tile::Accumulator o;
        typename Tile::Scores s;
        typename Tile::Weights weights;
        set_zero(o);
        set_zero(s);
        Softmax<Tile, kTwoTemperatures> softmax{scale0, scale1};
        Turn<Tile::kStages> turn;
        float shrink[2];
        // A barrier that has completed: no wait, but a loop, over which ptxas moves no wait for a product. As far as
        // the compiler knows it depends on the sums, so it comes after every exponential; they are never negative.
        auto hold = [&](float sums) { mbarrier_wait(tile.full(turn.stage), turn.parity ^ (sums == -1.f ? 1u : 0u)); };

        mbarrier_wait(tile.resident_full(), 0);
        mbarrier_wait(tile.full(turn.stage), turn.parity);
        wgmma_fence();
        tile.scores(s, tile.stage(turn.stage));
        wgmma_wait<0>(s);
        mask(tile, s, bank_rows - (run.first_tile + run.tiles - 1) * Tile::kColumns);
        softmax.update(s, shrink, hold);
        tile.pack_weights(weights, s);

        for (int t = 1; t < run.tiles; t++) {
            const int before = turn.stage;
            turn.next();
            mbarrier_wait(tile.full(turn.stage), turn.parity);
            wgmma_fence();
            tile.scores(s, tile.stage(turn.stage));
            tile.accumulate(o, weights, tile.stage(before));
            wgmma_wait<1>(s);
            const bool grown = softmax.update(s, shrink, hold);
            wgmma_wait<0>(o);
            tile.release(before);
            if (grown) {
#pragma unroll
                for (auto &fragment : o) {
#pragma unroll
                    for (int e = 0; e < 4; e++) fragment[e] *= shrink[e / 2];
                }
            }
            tile.pack_weights(weights, s);
        }
        wgmma_fence();
        tile.accumulate(o, weights, tile.stage(turn.stage));
        wgmma_wait<0>(o);

        constexpr float kUnscale = 1.f / (1 << int(kProbabilityScaleLog2));
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int bits = 1; bits <= 2; bits *= 2) {
                softmax.sum0[half] += __shfl_xor_sync(kFullWarp, softmax.sum0[half], bits);
                softmax.sum1[half] += __shfl_xor_sync(kFullWarp, softmax.sum1[half], bits);
            }
            const int64_t row = run.first_row + tile.row(half);
            if (row >= rows) continue;
            const int64_t at = blockIdx.y * rows + row;
#pragma unroll
            for (int n = 0; n < Tile::kGroupChannels / 8; n++) {
                *reinterpret_cast<float2 *>(sums + at * Tile::kPadded + tile.channel(n, 0)) =
                    make_float2(o[n][2 * half] * kUnscale, o[n][2 * half + 1] * kUnscale);
            }
            if (tile.lane % 4 == 0 && tile.channel_group == 0) {
                statistics[at] = {softmax.maximum[half], {softmax.sum0[half] * kUnscale, softmax.sum1[half]}, 0.f};
            }
        }
    };
    tile.run(start_copies, compute);
#endif
}

}  // namespace
}  // namespace caco::sm90

namespace caco {

template <>
Split BankAttend<Path::kSm90>::split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors) {
    Split split{};
    for_padded_channels(channels, [&](auto padded) {
        using Shape = sm90::Tile<bf16, padded()>;
        split = split_bank(rows, bank_rows, Shape::kRows, Shape::kColumns, multiprocessors);
    });
    return split;
}

template <>
int BankAttend<Path::kSm90>::shared_bytes(int channels) {
    int bytes = 0;
    for_padded_channels(channels, [&](auto padded) { bytes = sm90::Tile<bf16, padded()>::kSharedBytes; });
    return bytes;
}

template <>
void BankAttend<Path::kSm90>::enqueue(const AttendParams &params, const Target &target) {
    const Split split = BankAttend::split(params.rows, params.bank_rows, params.channels, target.multiprocessors);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        using Shape = sm90::Tile<decltype(operand), padded()>;
        float *sums = static_cast<float *>(params.workspace);
        auto *statistics = reinterpret_cast<RowStatistics *>(sums + split.splits * params.rows * Shape::kPadded);
        const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, Shape::kRows)), split.splits);
        auto enqueue = [&](auto kernel) {
            launch("bank_attend", kernel, grid, Shape::kThreads, Shape::kSharedBytes, target.stream,
                   make_tensor_map(params.queries, params.rows, Shape::kPadded, params.type, Shape::kRows),
                   make_tensor_map(params.bank, params.bank_rows, Shape::kPadded, params.type, Shape::kColumns), sums,
                   statistics, params.rows, params.bank_rows, split.tiles, kLog2E / params.temperature[0],
                   kLog2E / params.temperature[params.temperatures - 1]);
        };
        if (params.temperatures == 2) enqueue(sm90::attend_kernel<Shape, true>);
        else enqueue(sm90::attend_kernel<Shape, false>);
    });
    merge_attend(params, split.splits, target);
}

}  // namespace caco
