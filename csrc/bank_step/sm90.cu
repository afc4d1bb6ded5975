// bank_step on wgmma and TMA: g_j = -1 / (t |w_j|) sum_i a_i c_ij (q_i - s_ij u_j), V <- mu V + g, W <- W - eta V.
//
// Tile map   grid (bank tiles), as on sm80; a block owns kRows bank rows. The computing warpgroups make their unit rows
//            in shared memory while the first queries arrive, as keys and values at once, with their row terms.
// Overlap    as attend's: the scores of a tile and the second product of the tile before are both started, then the
//            weights of this tile are computed while the second product is under way. lse is given, so there is no
//            maximum; rows beyond R have weight 0, so no tile is masked.
// Epilogue   G = sum_i a_i p_ij q_i goes through shared memory, all of it at once into the tiles' room, and a warp
//            finishes whole rows (row.cuh).
// Proxies    products read the unit rows that threads stored, and TMA overwrites row terms that threads have read: both
//            are behind async_proxy_fence and a barrier. Copies and products that have been waited for need none.
// Bytes      reads 4 K C of the bank twice (the second time likely from L2) and of the velocity once, writes both once
//            and 2 K P of operand; 2 R P of queries per block from the L2 cache.
// Flop       4 R K P (6 R K P at P = 512). Limits: as sm80's, see tiles.cuh.
#include "../tiles/sm90.cuh"
#include "bank_step.h"
#include "row.cuh"

namespace caco::sm90 {
namespace {

template <class Tile>
struct StepShape {
    static constexpr int kTermsBytes = Tile::kColumns * int(sizeof(RowTerms));  // per stage
    static constexpr int kSharedBytes = Tile::kSharedBytes + Tile::kStages * kTermsBytes;
    static constexpr int kWarps = 4 * kComputeWarpgroups;
    static constexpr int kRowsAtOnce = 8;  // of the bank, that a warp loads before it uses the first
    // A row of the staged accumulator; 8 more floats send the four rows of a store phase to different banks.
    static constexpr int kStagedFloats = Tile::kPadded + 8;
    static_assert(Tile::kRows * kStagedFloats * 4 <= Tile::kTileBytes, "the accumulator fits the tiles' room");
    static_assert(kSharedBytes <= 227 * 1024, "sm_90 has 227 KB per block");
    static_assert(kRowTermsPad % Tile::kColumns == 0, "a tile of row terms is never ragged");
    static_assert(kRowTermsOffset % 16 == 0 && kTermsBytes % 16 == 0, "what a copy asks for");
    static_assert(Tile::kRows % (kWarps * kRowsAtOnce) == 0, "each warp makes the same number of unit rows");
};

#ifdef CACO_SM90A

// The unit rows of the bank from first_row on into the resident tile, for products; zeros beyond the bank. By warp
// number `warp` of the computing ones.
template <class Tile>
__device__ __forceinline__ void make_resident(const Tile &tile, const StepParams &params, int64_t first_row, int warp) {
    using Shape = StepShape<Tile>;
    constexpr int kAtOnce = Shape::kRowsAtOnce;
    const bool aligned = rows_are_aligned(params.bank, params.channels);
#pragma unroll 1
    for (int r = warp; r < Tile::kRows; r += Shape::kWarps * kAtOnce) {
        Row<Tile::kPadded> row[kAtOnce];
        float square[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; n++) {
            const int64_t j = first_row + r + n * Shape::kWarps;
            row[n].load(params.bank + j * params.channels, j < params.bank_rows ? params.channels : 0, tile.lane,
                        aligned);
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; n++) square[n] = row[n].part_of_dot(row[n]);
        warp_sums(square);
#pragma unroll
        for (int n = 0; n < kAtOnce; n++) {
            const float inverse_norm = inverse_root(square[n]);
#pragma unroll
            for (int i = 0; i < row[n].kValues; i += row[n].kTogether) {
                auto *to = tile.resident(r + n * Shape::kWarps, row[n].channel(i, tile.lane));
                store_for_products(reinterpret_cast<typename Row<Tile::kPadded>::Operands *>(to),
                                   row[n].template operands<typename Tile::T>(i, inverse_norm));
            }
        }
    }
}

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

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) step_kernel(const __grid_constant__ TensorMap queries,  // [R, P]
                                                                 const __grid_constant__ StepParams params,
                                                                 int tiles) {  // of queries
#ifdef CACO_SM90A
    using Shape = StepShape<Tile>;
    char *memory = shared_memory();
    const Tile tile(memory);
    const int64_t first_row = int64_t(blockIdx.x) * Tile::kRows;
    auto terms = [&](int stage) { return memory + Tile::kSharedBytes + stage * Shape::kTermsBytes; };

    auto start_copies = [&] {
        const char *all_terms = static_cast<const char *>(params.workspace) + kRowTermsOffset;
        auto copy_terms = [&](int64_t t, int stage) {
            bulk_load(terms(stage), all_terms + t * Shape::kTermsBytes, Shape::kTermsBytes, tile.full(stage));
        };
        tile.template copy_stream<false, Shape::kTermsBytes>(&queries, 0, tiles, copy_terms);
    };
    auto compute = [&] {
        typename Tile::Accumulator o;
        typename Tile::Scores s;
        typename Tile::Weights weights;
        Turn<Tile::kStages> turn;
        const int warp = int(threadIdx.x - kWarpgroupThreads) / 32;
        const float scale = kLog2E / params.temperature;  // as a parameter of the kernel it made ptxas spill
        // A barrier that has completed: see ../bank_attend/sm90.cu.
        auto hold = [&] { mbarrier_wait(tile.full(turn.stage), turn.parity); };
        auto weigh_scores = [&] {
            weigh(tile, s, reinterpret_cast<const RowTerms *>(terms(turn.stage)), scale);
            hold();
        };

        make_resident(tile, params, first_row, warp);
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
        const Span span = positives_of(params, first_row, first_row + Tile::kRows, tile.lane);
        const int64_t end = first_row + Tile::kRows < params.bank_rows ? first_row + Tile::kRows : params.bank_rows;
        RowBefore<Tile::kPadded> next;
        next.load(params, first_row + warp, end, tile.lane);
        float *staged = reinterpret_cast<float *>(memory);  // [kRows, kStagedFloats]
        tile.barrier();                                     // all products are done with the tiles
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int n = 0; n < Tile::kGroupChannels / 8; n++) {
                *reinterpret_cast<float2 *>(staged + tile.row(half) * Shape::kStagedFloats + tile.channel(n, 0)) =
                    make_float2(o[n][2 * half] * factor, o[n][2 * half + 1] * factor);
            }
        }
        tile.barrier();
        for (int r = warp; first_row + r < end; r += Shape::kWarps) {
            const RowBefore<Tile::kPadded> before = next;
            next.load(params, first_row + r + Shape::kWarps, end, tile.lane);
            Row<Tile::kPadded> pulled;
            pulled.load(staged + r * Shape::kStagedFloats, Tile::kPadded, tile.lane);
            step_row<typename Tile::T>(params, first_row + r, before, pulled, span, tile.lane);
        }
    };
    tile.run(start_copies, compute);
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
               int(ceil_div(params.rows, Shape::kColumns)));
    });
}

}  // namespace caco
