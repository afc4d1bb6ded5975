// Runs the operations once on emulated kernels and compares them with the formulas in f64; for sanitizers and CTest.
//
//     kernels_program R K C bfloat16|float16 [seed [greedy [lazy copies [path]]]]
//
// On a path without bf16 operands the products are in fp16. Prints "ok", or what is wrong, and returns 0 or 1. Legend: R rows, K bank rows, C channels, M = 2 positives.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "bank.h"
#include "tiles/primitives.cuh"

namespace {

constexpr int kPositives = 2;
constexpr float kTemperature[2] = {0.1f, 0.05f}, kLr = 0.5f, kMomentum = 0.9f, kWeightDecay = 0.01f;

struct Problem {
    int64_t rows, bank_rows;
    int channels;
    caco::OperandType type;
    std::vector<float> queries, bank, velocity, row_weight, positive_weight;
    std::vector<int64_t> positives;  // [R, M]
};

Problem make_problem(int64_t rows, int64_t bank_rows, int channels, caco::OperandType type) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    Problem p{rows, bank_rows, channels, type, {}, {}, {}, {}, {}, {}};
    for (int64_t i = 0; i < rows * channels; i++) p.queries.push_back(normal(random) / std::sqrt(float(channels)));
    for (int64_t i = 0; i < bank_rows * channels; i++) p.bank.push_back(normal(random));
    for (int64_t i = 0; i < bank_rows * channels; i++) p.velocity.push_back(0.01f * normal(random));
    for (int64_t i = 0; i < rows; i++) p.row_weight.push_back((1.f + i % 3) / rows);
    for (int64_t i = 0; i < rows * kPositives; i++) {
        p.positives.push_back(random() % bank_rows);
        p.positive_weight.push_back(0.5f);
    }
    return p;
}

struct Result {
    std::vector<float> lse, mean_row, similarity, bank, velocity;
    std::vector<int64_t> index;
};

// Memory exactly as large as asked for, so that AddressSanitizer sees the first byte beyond it.
template <class T>
std::vector<T> filled_with_nan(int64_t count) {
    return std::vector<T>(count, std::numeric_limits<T>::quiet_NaN());
}

Result run(const Problem &p, caco::Path path) {
    const caco::Target target{path, 0, 3, nullptr};
    const int64_t padded = caco::padded_channels(p.channels);
    std::vector<uint16_t> queries(p.rows * padded, 0xFFFF), unit(p.bank_rows * padded, 0xFFFF);
    caco::bank_operand({p.queries.data(), queries.data(), p.rows, p.channels, p.type, false}, target);
    caco::bank_operand({p.bank.data(), unit.data(), p.bank_rows, p.channels, p.type, true}, target);

    Result r{filled_with_nan<float>(2 * p.rows),
             filled_with_nan<float>(p.rows * p.channels),
             filled_with_nan<float>(p.rows),
             p.bank,
             p.velocity,
             std::vector<int64_t>(p.rows, -1)};
    const int64_t attend_bytes = caco::bank_attend_workspace(p.rows, p.bank_rows, p.channels, target);
    std::vector<float> workspace = filled_with_nan<float>(attend_bytes / 4);
    caco::bank_attend({queries.data(),
                       unit.data(),
                       r.lse.data(),
                       r.mean_row.data(),
                       workspace.data(),
                       p.rows,
                       p.bank_rows,
                       p.channels,
                       p.type,
                       2,
                       {kTemperature[0], kTemperature[1]}},
                      target);
    workspace = filled_with_nan<float>(caco::bank_select_workspace(p.rows, p.bank_rows, p.channels, target) / 4);
    caco::bank_select({queries.data(), unit.data(), p.queries.data(), p.bank.data(), r.index.data(),
                       r.similarity.data(), workspace.data(), p.rows, p.bank_rows, p.channels, p.type},
                      target);
    workspace = filled_with_nan<float>(caco::bank_step_workspace(p.rows) / 4);
    caco::bank_step({r.bank.data(),
                     r.velocity.data(),
                     unit.data(),
                     queries.data(),
                     p.queries.data(),
                     r.lse.data(),
                     p.row_weight.data(),
                     p.positives.data(),
                     p.positive_weight.data(),
                     workspace.data(),
                     p.rows,
                     p.bank_rows,
                     p.channels,
                     kPositives,
                     p.type,
                     kTemperature[0],
                     kMomentum,
                     kWeightDecay,
                     &kLr,
                     false},
                    target);
    return r;
}

Result formulas(const Problem &p) {
    const int64_t R = p.rows, K = p.bank_rows, C = p.channels;
    std::vector<double> unit(K * C), inverse(K), s(R * K);
    for (int64_t j = 0; j < K; j++) {
        double square = 0;
        for (int64_t c = 0; c < C; c++) square += double(p.bank[j * C + c]) * p.bank[j * C + c];
        inverse[j] = 1 / std::sqrt(square);
        for (int64_t c = 0; c < C; c++) unit[j * C + c] = p.bank[j * C + c] * inverse[j];
    }
    for (int64_t i = 0; i < R; i++) {
        for (int64_t j = 0; j < K; j++) {
            for (int64_t c = 0; c < C; c++) s[i * K + j] += p.queries[i * C + c] * unit[j * C + c];
        }
    }
    Result r{std::vector<float>(2 * R), std::vector<float>(R * C), std::vector<float>(R), p.bank, p.velocity,
             std::vector<int64_t>(R)};
    std::vector<double> gradient(K * C);
    for (int64_t i = 0; i < R; i++) {
        double lse[2];
        for (int t = 0; t < 2; t++) {
            double sum = 0;
            for (int64_t j = 0; j < K; j++) sum += std::exp(s[i * K + j] / kTemperature[t]);
            r.lse[t * R + i] = float(lse[t] = std::log(sum));
        }
        for (int64_t j = 1; j < K; j++) {
            if (s[i * K + j] > s[i * K + r.index[i]]) r.index[i] = j;
        }
        r.similarity[i] = float(s[i * K + r.index[i]]);
        std::vector<double> mean(C);
        for (int64_t j = 0; j < K; j++) {
            const double probability = std::exp(s[i * K + j] / kTemperature[0] - lse[0]);
            double pull = probability;
            for (int m = 0; m < kPositives; m++) {
                if (p.positives[i * kPositives + m] == j)
                    pull += p.positive_weight[i * kPositives + m] * (1 - 2 * probability);
            }
            for (int64_t c = 0; c < C; c++) {
                mean[c] += probability * unit[j * C + c];
                gradient[j * C + c] -= inverse[j] / kTemperature[0] * p.row_weight[i] * pull *
                                       (p.queries[i * C + c] - s[i * K + j] * unit[j * C + c]);
            }
        }
        for (int64_t c = 0; c < C; c++) r.mean_row[i * C + c] = float(mean[c]);
    }
    for (int64_t at = 0; at < K * C; at++) {
        r.velocity[at] = float(kMomentum * p.velocity[at] + gradient[at] + kWeightDecay * p.bank[at]);
        r.bank[at] = float(p.bank[at] - kLr * r.velocity[at]);
    }
    return r;
}

bool close(const char *name, const std::vector<float> &found, const std::vector<float> &expected, double tolerance) {
    double worst = 0, largest = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        const double off = std::abs(double(found[i]) - expected[i]);
        worst = off <= worst ? worst : off;  // NaN counts as worst
        largest = std::max(largest, std::abs(double(expected[i])));
    }
    if (worst <= tolerance * largest) return true;
    std::printf("wrong %s: off by %g, largest value %g\n", name, worst, largest);
    return false;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 5) {
        std::printf("usage: %s R K C bfloat16|float16 [seed [greedy [lazy copies [path]]]]\n", argv[0]);
        return 2;
    }
    auto option = [&](int at, int otherwise) { return at < argc ? std::atoi(argv[at]) : otherwise; };
    emu::schedule = {unsigned(option(5, 0)), option(6, 0) != 0, option(7, 1) != 0, 2};
    const auto path = static_cast<caco::Path>(option(8, 80));
    const bool half = std::string(argv[4]) == "float16" || !caco::takes_bfloat16(path);
    const Problem problem = make_problem(std::atoll(argv[1]), std::atoll(argv[2]), std::atoi(argv[3]),
                                         half ? caco::OperandType::kFloat16 : caco::OperandType::kBfloat16);
    try {
        const Result found = run(problem, path), expected = formulas(problem);
        const double tolerance =
            half ? 2e-3 : 1e-2;  // of operands rounded to 2^-11 or 2^-8, in units of the largest value
        bool good = close("lse", found.lse, expected.lse, tolerance);
        good &= close("mean_row", found.mean_row, expected.mean_row, tolerance);
        good &= close("similarity", found.similarity, expected.similarity, 1e-6);
        good &= close("velocity", found.velocity, expected.velocity, tolerance);
        good &= close("bank", found.bank, expected.bank, tolerance);
        if (found.index != expected.index) good = false, std::printf("wrong index\n");
        if (good) std::printf("ok\n");
        return good ? 0 : 1;
    } catch (const std::exception &error) {
        std::printf("error: %s\n", error.what());
        return 1;
    }
}
