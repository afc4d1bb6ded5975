// The bank operations as C++ sees them: one parameter struct and one launcher per operation.
//
// R rows of queries or keys, K bank rows, C channels, P = C rounded up to 64, 128, 256 or 512, M positives per row.
// u_j = w_j / |w_j| is bank row j at unit length, s_ij = q_i . u_j.
//
// Launchers only enqueue kernels on `stream`: no allocation, no synchronisation, so they may be captured in a CUDA
// graph. Every pointer is device memory; `workspace` is scratch of the size that the operation's *_workspace function
// gives. Two launches with the same arguments on the same device give the same bits.
#pragma once
#include <cstdint>

namespace caco {

enum class OperandType : int { kBfloat16 = 0, kFloat16 = 1 };

// Which family of kernels runs; each has its tiles in tiles/ and a source per operation.
enum class Path : int { kSm70 = 70, kSm80 = 80, kSm90 = 90 };

// The other paths take both operand types; this one throws std::invalid_argument on bfloat16.
constexpr bool takes_bfloat16(Path path) { return path != Path::kSm70; }

constexpr int kMaxChannels = 512;
constexpr int kMaxPositives = 8;
constexpr int kOperandBytes = 2;

struct Target {
    Path path;
    int device;
    int multiprocessors;  // of the device, for the split of the bank over thread blocks
    void *stream;         // cudaStream_t
};

// The path whose compiled kernels run on a GPU of this compute capability; 0: none was compiled for it.
int path_serving(int major, int minor);

// Channels of an operand row: C rounded up to a size that kernels are compiled for; the rest is zeros.
constexpr int padded_channels(int channels) {
    return channels <= 64 ? 64 : channels <= 128 ? 128 : channels <= 256 ? 256 : 512;
}

// Dynamic shared memory of each operation's kernel, in bytes; for tables.
struct SharedBytes {
    int attend, select, step;
};
SharedBytes shared_bytes(int channels, Path path);

// rows in f32 -> rows in operand type, at unit length or as they are, padded with zeros.
struct OperandParams {
    const float *rows;  // [N, C]
    void *operand;      // [N, P]
    int64_t count;      // N
    int channels;
    OperandType type;
    bool normalise;
};
void bank_operand(const OperandParams &params, const Target &target);

// lse_i = log sum_j exp(s_ij / t) for one or two temperatures; mean_row_i = sum_j softmax_j(s_ij / t_0) u_j.
struct AttendParams {
    const void *queries;  // [R, P] operand
    const void *bank;     // [K, P] operand, unit rows
    float *lse;           // [temperatures, R]
    float *mean_row;      // [R, C]
    void *workspace;
    int64_t rows, bank_rows;
    int channels;
    OperandType type;
    int temperatures;  // 1 or 2
    float temperature[2];
};
int64_t bank_attend_workspace(int64_t rows, int64_t bank_rows, int channels, const Target &target);  // bytes
void bank_attend(const AttendParams &params, const Target &target);

// index_i = argmax_j k_i . u_j, ties to the lowest; similarity_i is that maximum, in f32.
struct SelectParams {
    const void *keys;         // [R, P] operand
    const void *bank;         // [K, P] operand, unit rows
    const float *exact_keys;  // [R, C]
    const float *exact_bank;  // [K, C] raw rows
    int64_t *index;           // [R]
    float *similarity;        // [R]
    void *workspace;
    int64_t rows, bank_rows;
    int channels;
    OperandType type;
};
int64_t bank_select_workspace(int64_t rows, int64_t bank_rows, int channels, const Target &target);  // bytes
void bank_select(const SelectParams &params, const Target &target);

// p_ij = exp(s_ij / t - lse_i), c_ij = p_ij + sum_m o_im [j = positive_im] (1 - 2 p_ij),
// g_j = -1 / (t |w_j|) sum_i a_i c_ij (q_i - s_ij u_j);  V <- mu V + g + wd W;  W <- W - eta V;
// project: w_j <- w_j / |w_j|. W on the right-hand side is that from before the step.
struct StepParams {
    float *bank;                   // [K, C] in and out
    float *velocity;               // [K, C] in and out
    void *bank_operand;            // [K, P] out: unit rows of the new bank, as bank_operand writes them; may be null
    const void *queries;           // [R, P] operand
    const float *exact_queries;    // [R, C]; null if `queries` are exact
    const float *lse;              // [R]
    const float *row_weight;       // [R], a_i
    const int64_t *positive;       // [R, M], R M < 2^30; entries outside [0, K) are ignored
    const float *positive_weight;  // [R, M], o_im
    void *workspace;
    int64_t rows, bank_rows;
    int channels, positives;  // C, M
    OperandType type;
    float temperature, momentum, weight_decay;  // t, mu, wd
    const float *lr;                            // [], eta: on the device, so that the replay of a graph reads it anew
    bool project;
    const float *skip = nullptr;  // [] or null; if it is not 0, bank and velocity stay as they are
};
int64_t bank_step_workspace(int64_t rows);  // bytes
void bank_step(const StepParams &params, const Target &target);

}  // namespace caco
