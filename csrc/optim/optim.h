// The operations on lists of tensors as C++ sees them: the EMA of the key encoder and the LARS step.
//
// T tensors of n elements each, f32, dense in memory; the same tensor of every list has its elements in the same order.
// As in bank.h, launchers only enqueue kernels on the target's stream, may be captured in a CUDA graph, and give the
// same bits from launch to launch. They use no instruction of one architecture, so that every path runs them.
#pragma once
#include "../bank.h"

namespace caco {

constexpr int kMaxLists = 3;
// A block works on one chunk of one tensor: 64 KB of each list.
constexpr int kChunkElements = 16384;

// Where a tensor stands in each list. Chunks are numbered through all tensors; this one's are first_chunk to the next
// record's, which for an empty tensor are none.
struct TensorRecord {
    int64_t first_chunk;
    int64_t count;             // n
    float *address[kMaxLists];
};

constexpr int64_t tensor_chunks(int64_t count) { return (count + kChunkElements - 1) / kChunkElements; }

// Writes the device's table from addresses that the host knows. They travel as kernel parameters: no copy from host
// memory that a graph would read again when it is replayed.
struct TensorTableParams {
    const int64_t *counts;      // [T] on the host
    const uint64_t *addresses;  // [lists, T] on the host
    int tensors, lists;         // T
    TensorRecord *table;        // [T + 1] out
};
void write_tensor_table(const TensorTableParams &params, const Target &target);

// g <- g + w (f - g)
struct EmaUpdateParams {
    const TensorRecord *table;  // [T + 1]; lists: g in and out, f
    int tensors;
    int64_t chunks;       // of all tensors
    const float *skip;    // [] or null; where it is not 0 nothing changes
    const float *weight;  // [], w: on the device, as lr below, so that the replay of a graph reads it anew
};
void ema_update(const EmaUpdateParams &params, const Target &target);

// d = g / s;  for the first `trusted` tensors d <- d + weight_decay w, d <- trust |w| / |d| d (unscaled where either
// norm is 0);  v <- momentum v + d;  w <- w - lr v
struct LarsStepParams {
    const TensorRecord *table;  // [T + 1]; lists: w in and out, g, v in and out
    int tensors, trusted;
    int64_t chunks, trusted_chunks;  // of all tensors, of the trusted ones
    const float *grad_scale;         // [], s, or null for 1
    const float *skip;               // [] or null; where it is not 0 nothing changes
    void *workspace;
    const float *lr;                 // []
    float momentum, weight_decay, trust;
};
constexpr int64_t lars_step_workspace(int64_t trusted, int64_t trusted_chunks) {  // bytes
    return (2 * trusted_chunks + trusted) * int64_t(sizeof(float));
}
void lars_step(const LarsStepParams &params, const Target &target);

}  // namespace caco
