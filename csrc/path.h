// What each path defines in its folder and bank.cu calls. `multiprocessors` is that of the Target.
#pragma once
#include "stages.h"

namespace caco {

template <Path kPath>
struct Kernels {
    static Split attend_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors);
    static Split select_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors);
    static SharedBytes shared_bytes(int channels);
    static void bank_attend(const AttendParams &params, const Target &target);
    static void bank_select(const SelectParams &params, const Target &target);
    static void bank_step(const StepParams &params, const Target &target);
};

}  // namespace caco
