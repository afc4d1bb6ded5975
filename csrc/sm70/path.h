// What the sm_70 path offers to bank.cu. Its operands are fp16 (takes_bfloat16 in bank.h), so |q| must be below 6e4 for every
// type of queries.
#pragma once
#include "../stages.h"

namespace caco::sm70 {

Split attend_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors);
Split select_split(int64_t rows, int64_t bank_rows, int channels, int multiprocessors);
void bank_attend(const AttendParams &params, const Target &target);
void bank_select(const SelectParams &params, const Target &target);
SharedBytes shared_bytes(int channels);
void bank_step(const StepParams &params, const Target &target);

}  // namespace caco::sm70
