// The Python module caco_fast._C: the launchers of bank.h with addresses as integers. The only file that knows Python.
//
// Tensors arrive as data_ptr() and streams as cuda_stream, so the module needs no torch, neither to build nor to load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bank.h"

namespace py = pybind11;
using namespace py::literals;

#ifdef CACO_EMULATE
void bind_emulation(py::module_ &m);  // tests/emulation/bind.cpp
#endif

namespace {

using Address = uintptr_t;

template <class T>
T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

std::vector<std::string> compiled_arches() {
    std::vector<std::string> arches;
    std::istringstream text(CACO_ARCHES);
    for (std::string arch; std::getline(text, arch, ';');) arches.push_back(arch);
    return arches;
}

caco::OperandType operand_type(const std::string &name) {
    if (name == "bfloat16") return caco::OperandType::kBfloat16;
    if (name == "float16") return caco::OperandType::kFloat16;
    throw py::value_error("caco_fast._C: operand type: found '" + name + "', wanted 'bfloat16' or 'float16'");
}

}  // namespace

PYBIND11_MODULE(CACO_MODULE, m) {
    m.doc() = "Compiled kernels of caco_fast; caco_fast.ops is the interface to use.";
    m.attr("arches") = compiled_arches();
    m.attr("source_hash") = CACO_SOURCE_HASH;
    m.attr("compiler") = CACO_COMPILER;
    m.attr("max_channels") = caco::kMaxChannels;
    m.attr("max_positives") = caco::kMaxPositives;
    m.def("path_serving", &caco::path_serving, "major"_a, "minor"_a,
          "The kernel path for a GPU of this compute capability; 0 where none was compiled.");
    m.def("padded_channels", [](int channels) { return caco::padded_channels(channels); }, "channels"_a);

    m.def(
        "shared_bytes",
        [](int channels, int path) {
            const caco::SharedBytes bytes = caco::shared_bytes(channels, static_cast<caco::Path>(path));
            return py::dict("attend"_a = bytes.attend, "select"_a = bytes.select, "step"_a = bytes.step);
        },
        "channels"_a, "path"_a, "Dynamic shared memory of each operation's kernel.");

    py::class_<caco::Target>(m, "Target", py::module_local(), "Where a launch goes.")
        .def(py::init([](int path, int device, int multiprocessors, Address stream) {
                 return caco::Target{static_cast<caco::Path>(path), device, multiprocessors, at<void>(stream)};
             }),
             "path"_a, "device"_a, "multiprocessors"_a, "stream"_a)
        .def_property_readonly("takes_bfloat16",
                               [](const caco::Target &target) { return caco::takes_bfloat16(target.path); });

    m.def(
        "bank_operand",
        [](const caco::Target &target, Address rows, Address operand, int64_t count, int channels,
           const std::string &type, bool normalise) {
            caco::bank_operand({at<float>(rows), at<void>(operand), count, channels, operand_type(type), normalise},
                               target);
        },
        "target"_a, py::kw_only(), "rows"_a, "operand"_a, "count"_a, "channels"_a, "type"_a, "normalise"_a);

    m.def("bank_attend_workspace", &caco::bank_attend_workspace, "rows"_a, "bank_rows"_a, "channels"_a, "target"_a);
    m.def(
        "bank_attend",
        [](const caco::Target &target, Address queries, Address bank, Address lse, Address mean_row, Address workspace,
           int64_t rows, int64_t bank_rows, int channels, const std::string &type,
           const std::vector<float> &temperatures) {
            const int count = static_cast<int>(temperatures.size());
            if (count != 1 && count != 2) throw py::value_error("bank_attend: wanted one or two temperatures");
            caco::bank_attend({at<void>(queries),
                               at<void>(bank),
                               at<float>(lse),
                               at<float>(mean_row),
                               at<void>(workspace),
                               rows,
                               bank_rows,
                               channels,
                               operand_type(type),
                               count,
                               {temperatures.front(), temperatures.back()}},
                              target);
        },
        "target"_a, py::kw_only(), "queries"_a, "bank"_a, "lse"_a, "mean_row"_a, "workspace"_a, "rows"_a, "bank_rows"_a,
        "channels"_a, "type"_a, "temperatures"_a);

    m.def("bank_select_workspace", &caco::bank_select_workspace, "rows"_a, "bank_rows"_a, "channels"_a, "target"_a);
    m.def(
        "bank_select",
        [](const caco::Target &target, Address keys, Address bank, Address exact_keys, Address exact_bank,
           Address index, Address similarity, Address workspace, int64_t rows, int64_t bank_rows, int channels,
           const std::string &type) {
            caco::bank_select(
                {at<void>(keys), at<void>(bank), at<float>(exact_keys), at<float>(exact_bank), at<int64_t>(index),
                 at<float>(similarity), at<void>(workspace), rows, bank_rows, channels, operand_type(type)},
                target);
        },
        "target"_a, py::kw_only(), "keys"_a, "bank"_a, "exact_keys"_a, "exact_bank"_a, "index"_a, "similarity"_a,
        "workspace"_a, "rows"_a, "bank_rows"_a, "channels"_a, "type"_a);

    m.def("bank_step_workspace", &caco::bank_step_workspace, "rows"_a);
    m.def(
        "bank_step",
        [](const caco::Target &target, Address bank, Address velocity, Address bank_operand, Address queries,
           Address exact_queries, Address lse, Address row_weight, Address positive_row, Address positive_place,
           Address positive_weight, Address workspace, int64_t rows, int64_t bank_rows, int channels, int positives,
           const std::string &type, float temperature, Address lr, float momentum, bool project, Address skip) {
            caco::bank_step({at<float>(bank),
                             at<float>(velocity),
                             at<void>(bank_operand),
                             at<void>(queries),
                             at<float>(exact_queries),
                             at<float>(lse),
                             at<float>(row_weight),
                             at<int64_t>(positive_row),
                             at<int64_t>(positive_place),
                             at<float>(positive_weight),
                             at<void>(workspace),
                             rows,
                             bank_rows,
                             channels,
                             positives,
                             operand_type(type),
                             temperature,
                             momentum,
                             at<float>(lr),
                             project,
                             at<float>(skip)},
                            target);
        },
        "target"_a, py::kw_only(), "bank"_a, "velocity"_a, "bank_operand"_a, "queries"_a, "exact_queries"_a, "lse"_a,
        "row_weight"_a, "positive_row"_a, "positive_place"_a, "positive_weight"_a, "workspace"_a, "rows"_a,
        "bank_rows"_a, "channels"_a, "positives"_a, "type"_a, "temperature"_a, "lr"_a, "momentum"_a, "project"_a,
        "skip"_a);

#ifdef CACO_EMULATE
    bind_emulation(m);
#endif
}
