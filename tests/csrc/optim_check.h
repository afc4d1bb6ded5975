// EMA and LARS once on emulated kernels, compared with the formulas in f64; a part of kernels_program.
#pragma once
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "optim/optim.h"

namespace optim_check {

// About the borders of a chunk and of four elements. Vectors are exactly as large as that, so that AddressSanitizer
// sees the first byte beyond; the first `kTrusted` count as being of two or more dimensions.
inline const std::vector<int64_t> kCounts = {5, 16384, 0, 16387, 1, 40};
constexpr int kTrusted = 4;
constexpr float kWeight = 0.3f, kScale = 8.f, kLr = 0.5f, kMomentum = 0.9f, kDecay = 0.01f, kTrust = 0.1f;

using Lists = std::vector<std::vector<float>>;

inline Lists draw(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    Lists tensors;
    for (int64_t count : kCounts) {
        tensors.emplace_back();
        for (int64_t i = 0; i < count; i++) tensors.back().push_back(normal(random));
        tensors.back().shrink_to_fit();
    }
    return tensors;
}

inline int64_t chunks(size_t tensors) {
    int64_t sum = 0;
    for (size_t t = 0; t < tensors; t++) sum += caco::tensor_chunks(kCounts[t]);
    return sum;
}

inline std::vector<caco::TensorRecord> table_of(std::vector<Lists *> lists, const caco::Target &target) {
    std::vector<uint64_t> addresses;
    for (Lists *list : lists) {
        for (auto &tensor : *list) addresses.push_back(reinterpret_cast<uint64_t>(tensor.data()));
    }
    std::vector<caco::TensorRecord> table(kCounts.size() + 1);
    caco::write_tensor_table(
        {kCounts.data(), addresses.data(), int(kCounts.size()), int(lists.size()), table.data()}, target);
    return table;
}

inline bool close(const char *name, float found, double exact) {
    if (std::abs(found - exact) <= 2e-6 * (1 + std::abs(exact))) return true;  // a few roundings
    std::printf("wrong %s: found %g, expected %g\n", name, found, exact);
    return false;
}

inline bool holds(const caco::Target &target) {
    const int tensors = int(kCounts.size());
    bool good = true;

    Lists averages = draw(1);
    Lists values = draw(2);
    const Lists before = averages;
    const auto ema_table = table_of({&averages, &values}, target);
    caco::ema_update({ema_table.data(), tensors, chunks(tensors), nullptr, &kWeight}, target);
    for (int t = 0; t < tensors; t++) {
        for (int64_t i = 0; i < kCounts[t] && good; i++) {
            good = close("ema", averages[t][i], before[t][i] + double(kWeight) * (values[t][i] - double(before[t][i])));
        }
    }

    Lists weights = draw(3), grads = draw(4), velocities = draw(5);
    const Lists old_weights = weights, old_velocities = velocities;
    const auto table = table_of({&weights, &grads, &velocities}, target);
    std::vector<float> workspace(caco::lars_step_workspace(kTrusted, chunks(kTrusted)) / sizeof(float), NAN);
    float flag = 1.f;
    const caco::LarsStepParams params{table.data(), tensors, kTrusted, chunks(tensors), chunks(kTrusted),
                                      &kScale,      &flag,   workspace.data(), &kLr,   kMomentum, kDecay, kTrust};
    caco::lars_step(params, target);
    if (weights != old_weights || velocities != old_velocities) good = false, std::printf("lars was not skipped\n");
    flag = 0.f;
    caco::lars_step(params, target);
    for (int t = 0; t < tensors; t++) {
        const double decay = t < kTrusted ? kDecay : 0;
        auto direction = [&](int64_t i) { return grads[t][i] / double(kScale) + decay * old_weights[t][i]; };
        double weight_square = 0, square = 0, ratio = 1;
        for (int64_t i = 0; i < kCounts[t]; i++) {
            weight_square += double(old_weights[t][i]) * old_weights[t][i], square += direction(i) * direction(i);
        }
        if (t < kTrusted && weight_square > 0 && square > 0) ratio = kTrust * std::sqrt(weight_square / square);
        for (int64_t i = 0; i < kCounts[t] && good; i++) {
            const double velocity = kMomentum * double(old_velocities[t][i]) + ratio * direction(i);
            good = close("lars velocity", velocities[t][i], velocity) &&
                   close("lars weight", weights[t][i], old_weights[t][i] - kLr * velocity);
        }
    }
    return good;
}

}  // namespace optim_check
