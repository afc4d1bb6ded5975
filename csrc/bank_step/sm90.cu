// bank_step on wgmma and TMA: g_j = -1 / (t |w_j|) sum_i a_i c_ij (q_i - s_ij u_j), V <- mu V + g + wd W,
// W <- W - eta V.
//
// Tile map   grid (bank tiles), as on sm80; a block owns kRows bank rows. The computing warpgroups make their unit rows
//            in shared memory while the first queries arrive, as keys and values at once, with their row terms.
// Overlap    as attend's: the scores of a tile and the second product of the tile before are both started, then the
//            weights of this tile are computed while the second product is under way. lse is given, so there is no
//            maximum; rows beyond R have weight 0, so no tile is masked.
// Meanwhile  the copying thread asks for the block's velocity and for the bank rows of the block that will follow here
//            in the L2 cache, a piece with every tile; the next warp finds and weighs the block's positives
//            (positives.cuh).
// Epilogue   G = sum_i a_i p_ij q_i goes through shared memory, all of it at once into the tiles' room; threads add the
//            positives, and a warp finishes four whole rows at a time, two at P = 512 (row.cuh).
// Proxies    products read the unit rows that threads stored, and TMA overwrites row terms that threads have read: both
//            are behind async_proxy_fence and a barrier. Copies and products that have been waited for need none.
// Bytes      reads 4 K C of the bank twice (the second time likely from L2) and of the velocity once, writes both once
//            and 2 K P of operand; 2 R P of queries and 8 R M of positives per block from the L2 cache.
// Flop       4 R K P (6 R K P at P = 512). Limits: as sm80's, see tiles.cuh.
#include "../tiles/sm90.cuh"
#include "bank_step.h"
#include "positives.cuh"
#include "row.cuh"

namespace caco::sm90 {
namespace {

template <class Tile>
struct StepShape {
    static constexpr int kTermsBytes = Tile::kColumns * int(sizeof(RowTerms));  // per stage
    static constexpr int kListAt = Tile::kSharedBytes + Tile::kStages * kTermsBytes;
    static constexpr int kSharedBytes = kListAt + int(sizeof(PositiveList));
    static constexpr int kWarps = 4 * kComputeWarpgroups;
    static constexpr int kRowsAtOnce = 8;  // of the bank, that a warp loads before it uses the first
    static constexpr int kRowsFinished = Tile::kPadded == 512 ? 2 : 4;  // at once
    // A row of the staged accumulator; 8 more floats send the four rows of a store phase to different banks.
    static constexpr int kStagedFloats = Tile::kPadded + 8;
    static_assert(Tile::kRows * kStagedFloats * 4 <= Tile::kTileBytes, "the accumulator fits the tiles' room");
    static_assert(kSharedBytes <= 227 * 1024, "sm_90 has 227 KB per block");
    static_assert(kRowTermsPad % Tile::kColumns == 0, "a tile of row terms is never ragged");
    static_assert(kRowTermsOffset % 16 == 0 && kTermsBytes % 16 == 0, "what a copy asks for");
};

#ifdef CACO_SM90A

// Scores become 2^14 a_i p_ij / max |a|.
template <class Tile>
__device__ __forceinline__ void weigh(const Tile &tile, typename Tile::Scores &s, const RowTerms *terms, float scale) {
#pragma unroll
    for (int n = 0; n < Tile::kColumns / 8; n++) {
        const float4 two = *reinterpret_cast<const float4 *>(terms + tile.column(n, 0));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            s[n][2 * half] = fast_exp2(fmaf(s[n][2 * half], scale, two.x)) * two.y;
            s[n][2 * half + 1] = fast_exp2(fmaf(s[n][2 * half + 1], scale, two.z)) * two.w;
        }
    }
    finish_before_wait(s);
}

// Asks for rows first .. end - 1 of `rows` in the L2 cache, in `pieces` calls, of which this is number `piece`.
__device__ __forceinline__ void prefetch_piece(const float *rows, int64_t first, int64_t end, int channels, int pieces,
                                               int piece) {
    if (first >= end || !rows_are_aligned(rows, channels)) return;
    const int units = int(end - first) * channels / 4;  // of 16 bytes
    const int most = (units + pieces - 1) / pieces, left = units - piece * most;
    if (left > 0) bulk_prefetch(rows + first * channels + 4 * piece * most, 16 * (left < most ? left : most));
}

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) step_kernel(const __grid_constant__ TensorMap queries,  // [R, P]
                                                                 const __grid_constant__ StepParams params,
                                                                 int tiles,  // of queries
                                                                 int blocks_at_once) {
#ifdef CACO_SM90A
    using Shape = StepShape<Tile>;
    using T = typename Tile::T;
    char *memory = shared_memory();
    const Tile tile(memory);
    auto end_of = [&](int64_t first) {
        return first + Tile::kRows < params.bank_rows ? first + Tile::kRows : params.bank_rows;
    };
    const int64_t first_row = int64_t(blockIdx.x) * Tile::kRows, end = end_of(first_row);
    const int rows = int(end - first_row);
    const int total = int(params.rows) * params.positives;
    auto terms = [&](int stage) { return memory + Tile::kSharedBytes + stage * Shape::kTermsBytes; };
    PositiveList &list = *reinterpret_cast<PositiveList *>(memory + Shape::kListAt);
    Mbarrier *listed = tile.resident_full();  // nothing is copied into the resident tile

    auto start_copies = [&] {
        const char *all_terms = static_cast<const char *>(params.workspace) + kRowTermsOffset;
        // The block that is likely to follow here; only it will write its rows.
        const int64_t following = first_row + int64_t(blocks_at_once) * Tile::kRows;
        auto copy_terms = [&](int64_t t, int stage) {
            bulk_load(terms(stage), all_terms + t * Shape::kTermsBytes, Shape::kTermsBytes, tile.full(stage));
            prefetch_piece(params.velocity, first_row, end, params.channels, tiles, int(t));
            prefetch_piece(params.bank, following, end_of(following), params.channels, tiles, int(t));
        };
        tile.template copy_stream<false, Shape::kTermsBytes>(&queries, 0, tiles, copy_terms);
    };
    auto compute = [&] {
        typename Tile::Accumulator o;
        typename Tile::Scores s;
        typename Tile::Weights weights;
        Turn<Tile::kStages> turn;
        const int thread = int(threadIdx.x) - kWarpgroupThreads;
        const int warp = int(threadIdx.x - kWarpgroupThreads) / 32;
        const float scale = kLog2E / params.temperature;  // as a parameter of the kernel it made ptxas spill
        // A barrier that has completed: see ../bank_attend/sm90.cu.
        auto hold = [&] { mbarrier_wait(tile.full(turn.stage), turn.parity); };
        auto weigh_scores = [&] {
            weigh(tile, s, reinterpret_cast<const RowTerms *>(terms(turn.stage)), scale);
            hold();
        };

        using Operands = typename Row<Tile::kPadded>::Operands;
        make_unit_rows<T, Tile::kPadded, Tile::kRows, Shape::kWarps, Shape::kRowsAtOnce>(
            params, first_row, warp, tile.lane, [&](int row, int channel, const Operands &operands) {
                store_for_products(reinterpret_cast<Operands *>(tile.resident(row, channel)), operands);
            });
        async_proxy_fence();
        tile.barrier();

        set_zero(o);
        set_zero(s);
        mbarrier_wait(tile.full(turn.stage), turn.parity);
        wgmma_fence();
        tile.scores(s, tile.stage(turn.stage));
        wgmma_wait<0>(s);
        weigh_scores();
        tile.pack_weights(weights, s);

        for (int t = 1; t < tiles; t++) {
            const int before = turn.stage;
            turn.next();
            mbarrier_wait(tile.full(turn.stage), turn.parity);
            wgmma_fence();
            tile.scores(s, tile.stage(turn.stage));
            tile.accumulate(o, weights, tile.stage(before));
            wgmma_wait<1>(s);
            weigh_scores();
            async_proxy_fence();  // this thread has read row terms, of `before` in the round before
            wgmma_wait<0>(o);
            __syncwarp();
            tile.release(before);
            tile.pack_weights(weights, s);
        }
        wgmma_fence();
        tile.accumulate(o, weights, tile.stage(turn.stage));
        wgmma_wait<0>(o);

        const float factor = *static_cast<const float *>(params.workspace);
        const StepRate rate(params);
        constexpr int kAtOnce = Shape::kRowsFinished, kTurn = Shape::kWarps * kAtOnce;
        auto rows_from = [&](int r) { return [=](int n) { return first_row + r + n * Shape::kWarps; }; };
        RowsBefore<Tile::kPadded, kAtOnce> next;
        next.load(params, rate, rows_from(warp), end, tile.lane);
        float *staged = reinterpret_cast<float *>(memory);  // [kRows, kStagedFloats]
        mbarrier_wait(listed, 0);
        tile.barrier();  // all products are done with the tiles
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int n = 0; n < Tile::kGroupChannels / 8; n++) {
                *reinterpret_cast<float2 *>(staged + tile.row(half) * Shape::kStagedFloats + tile.channel(n, 0)) =
                    make_float2(o[n][2 * half] * factor, o[n][2 * half + 1] * factor);
            }
        }
        bool weighed = list.count <= kFewPositives;
        while (true) {
            if (!weighed) weigh_positives<T, Tile::kPadded, 8>(params, list, first_row, warp, Shape::kWarps, tile.lane);
            tile.barrier();
            add_positives<T, Tile::kPadded, 16>(params, list, staged, Shape::kStagedFloats, thread,
                                                kWarpgroupThreads * kComputeWarpgroups, [](int row) { return row; });
            const int next_entry = list.next;
            if (next_entry >= total) break;
            tile.barrier();
            if (warp == 0) find_positives<4>(params, list, next_entry, first_row, rows, tile.lane);
            tile.barrier();
            weighed = false;
        }
        tile.barrier();
#pragma unroll 1
        for (int r = warp; first_row + r < end; r += kTurn) {
            const RowsBefore<Tile::kPadded, kAtOnce> before = next;
            next.load(params, rate, rows_from(r + kTurn), end, tile.lane);
            Row<Tile::kPadded> pulled[kAtOnce];
#pragma unroll
            for (int n = 0; n < kAtOnce; n++) {
                pulled[n].load(staged + (r + n * Shape::kWarps) * Shape::kStagedFloats, Tile::kPadded, tile.lane, true);
            }
            step_rows<T>(params, rate, before, pulled, rows_from(r), end, tile.lane);
        }
    };
    auto find = [&] {
        const int lane = tile.lane;
        find_positives<2>(params, list, 0, first_row, rows, lane);
        __syncwarp();
        if (list.count <= kFewPositives) weigh_positives<T, Tile::kPadded, 1>(params, list, first_row, 0, 1, lane);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(listed);
    };
    tile.run(start_copies, compute, find);
#endif
}

}  // namespace
}  // namespace caco::sm90

namespace caco {

template <>
int BankStep<Path::kSm90>::shared_bytes(int channels) {
    int bytes = 0;
    for_padded_channels(channels,
                        [&](auto padded) { bytes = sm90::StepShape<sm90::Tile<bf16, padded()>>::kSharedBytes; });
    return bytes;
}

template <>
void BankStep<Path::kSm90>::enqueue(const StepParams &params, const Target &target) {
    if (params.rows == 0) return BankStep<Path::kSm80>::enqueue(params, target);  // nothing for TMA to describe
    step_row_terms(params, target);
    for_operand(params.type, params.channels, [&](auto operand, auto padded) {
        using Shape = sm90::Tile<decltype(operand), padded()>;
        constexpr int kSharedBytes = sm90::StepShape<Shape>::kSharedBytes;
        const dim3 grid(static_cast<unsigned>(ceil_div(params.bank_rows, Shape::kRows)));
        launch("bank_step", sm90::step_kernel<Shape>, grid, Shape::kThreads, kSharedBytes, target.stream,
               make_tensor_map(params.queries, params.rows, Shape::kPadded, params.type, Shape::kColumns), params,
               int(ceil_div(params.rows, Shape::kColumns)), target.multiprocessors);
    });
}

}  // namespace caco
