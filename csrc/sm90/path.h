// What the sm_90a path offers to bank.cu.
#pragma once
#include "../stages.h"

namespace caco::sm90 {

Split attend_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors);
Split select_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors);
void bank_attend(const AttendParams &params, const Target &target);
void bank_select(const SelectParams &params, const Target &target);
SharedBytes shared_bytes(int channels);
void bank_step(const StepParams &params, const Target &target);

}  // namespace caco::sm90
