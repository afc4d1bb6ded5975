// One launcher per operation: sends the call to the path that serves the device.
#include "bank.h"

#include <sstream>
#include <stdexcept>
#include <string>

#include "bank_attend/bank_attend.h"
#include "bank_select/bank_select.h"
#include "bank_step/bank_step.h"
#include "tiles/primitives.cuh"

namespace caco {
namespace {

template <Path kPath>
using PathConstant = std::integral_constant<Path, kPath>;

// Calls body(PathConstant<path>{}).
template <class Body>
auto on_path(Path path, Body &&body) {
    switch (path) {
        case Path::kSm70:
            return body(PathConstant<Path::kSm70>{});
        case Path::kSm80:
            return body(PathConstant<Path::kSm80>{});
        case Path::kSm90:
            return body(PathConstant<Path::kSm90>{});
    }
    throw std::invalid_argument("caco: unknown kernel path " + std::to_string(static_cast<int>(path)));
}

void check_type(OperandType type, Path path) {
    if (type == OperandType::kBfloat16 && !takes_bfloat16(path)) {
        throw std::invalid_argument("caco: found bfloat16 operands, expected float16; this GPU multiplies no others");
    }
}

}  // namespace

// Machine code for sm_XY runs on every GPU of the same major number whose minor one is not smaller; that for sm_90a, on
// sm_90 only.
int path_serving(int major, int minor) {
    std::istringstream arches(CACO_ARCHES);
    int path = 0;
    for (std::string arch; std::getline(arches, arch, ';');) {
        if (arch == "90a") {
            if (major == 9 && minor == 0) return static_cast<int>(Path::kSm90);
            continue;
        }
        const int number = std::stoi(arch);
        if (number / 10 != major || number % 10 > minor) continue;
        if (number >= 80) path = static_cast<int>(Path::kSm80);
        else if (number >= 70) path = static_cast<int>(Path::kSm70);
    }
    return path;
}

SharedBytes shared_bytes(int channels, Path path) {
    return on_path(path, [&](auto path) {
        return SharedBytes{BankAttend<path()>::shared_bytes(channels), BankSelect<path()>::shared_bytes(channels),
                           BankStep<path()>::shared_bytes(channels)};
    });
}

int64_t bank_attend_workspace(int64_t rows, int64_t bank_rows, int channels, const Target &target) {
    const Split split = on_path(target.path, [&](auto path) {
        return BankAttend<path()>::split(rows, bank_rows, channels, target.multiprocessors);
    });
    return attend_workspace(rows, channels, split.splits);
}

int64_t bank_select_workspace(int64_t rows, int64_t bank_rows, int channels, const Target &target) {
    const Split split = on_path(target.path, [&](auto path) {
        return BankSelect<path()>::split(rows, bank_rows, channels, target.multiprocessors);
    });
    return select_workspace(rows, split.splits);
}

int64_t bank_step_workspace(int64_t rows) { return step_workspace(rows); }

void bank_attend(const AttendParams &params, const Target &target) {
    const DeviceScope scope(target.device);
    check_type(params.type, target.path);
    on_path(target.path, [&](auto path) { BankAttend<path()>::enqueue(params, target); });
}

void bank_select(const SelectParams &params, const Target &target) {
    const DeviceScope scope(target.device);
    check_type(params.type, target.path);
    on_path(target.path, [&](auto path) { BankSelect<path()>::enqueue(params, target); });
}

void bank_step(const StepParams &params, const Target &target) {
    const DeviceScope scope(target.device);
    check_type(params.type, target.path);
    on_path(target.path, [&](auto path) { BankStep<path()>::enqueue(params, target); });
}

}  // namespace caco
