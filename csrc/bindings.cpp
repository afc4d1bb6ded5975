// The Python module caco_fast._C: the parameter structs and launchers of bank.h. The only file that knows Python.
//
// Tensors arrive as data_ptr() and streams as cuda_stream, so the module needs no torch, neither to build nor to load.
// A new field of an operation is one line in bank.h, one here and one in caco_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <type_traits>
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
    throw py::value_error("caco_fast._C: operand type: found '" + name + "', expected 'bfloat16' or 'float16'");
}

// A parameter struct as a Python class that begins as zeros. Its attributes are set by name; `fields` lists them.
template <class Params>
class Struct {
   public:
    Struct(py::module_ &m, const char *name) : binding_(m, name, py::module_local()) {
        binding_.def(py::init([] { return Params{}; }));
    }
    ~Struct() { binding_.attr("fields") = names_; }

    template <class T>
    Struct &field(const char *name, T Params::*member) {
        if constexpr (std::is_pointer_v<T>) {
            return set(name,
                       [member](Params &params, Address address) { params.*member = reinterpret_cast<T>(address); });
        } else if constexpr (std::is_same_v<T, caco::OperandType>) {
            return set(name,
                       [member](Params &params, const std::string &type) { params.*member = operand_type(type); });
        } else {
            return set(name, [member](Params &params, T value) { params.*member = value; });
        }
    }

    template <class Setter>
    Struct &set(const char *name, Setter setter) {
        binding_.def_property(name, nullptr, py::cpp_function(setter, py::is_setter()));
        names_.append(name);
        return *this;
    }

   private:
    py::class_<Params> binding_;
    py::list names_;
};

void set_temperatures(caco::AttendParams &params, const std::vector<float> &values) {
    if (values.size() != 1 && values.size() != 2) {
        const std::string found = std::to_string(values.size());
        throw py::value_error("bank_attend: temperatures: found " + found + ", expected 1 or 2");
    }
    params.temperatures = static_cast<int>(values.size());
    params.temperature[0] = values.front();
    params.temperature[1] = values.back();
}

template <class Params>
void def_launcher(py::module_ &m, const char *name, void (*launcher)(const Params &, const caco::Target &)) {
    m.def(
        name, [launcher](const caco::Target &target, const Params &params) { launcher(params, target); }, "target"_a,
        "params"_a);
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

    Struct<caco::OperandParams>(m, "OperandParams")
        .field("rows", &caco::OperandParams::rows)
        .field("operand", &caco::OperandParams::operand)
        .field("count", &caco::OperandParams::count)
        .field("channels", &caco::OperandParams::channels)
        .field("type", &caco::OperandParams::type)
        .field("normalise", &caco::OperandParams::normalise);
    def_launcher(m, "bank_operand", &caco::bank_operand);

    Struct<caco::AttendParams>(m, "AttendParams")
        .field("queries", &caco::AttendParams::queries)
        .field("bank", &caco::AttendParams::bank)
        .field("lse", &caco::AttendParams::lse)
        .field("mean_row", &caco::AttendParams::mean_row)
        .field("workspace", &caco::AttendParams::workspace)
        .field("rows", &caco::AttendParams::rows)
        .field("bank_rows", &caco::AttendParams::bank_rows)
        .field("channels", &caco::AttendParams::channels)
        .field("type", &caco::AttendParams::type)
        .set("temperatures", &set_temperatures);
    m.def("bank_attend_workspace", &caco::bank_attend_workspace, "rows"_a, "bank_rows"_a, "channels"_a, "target"_a);
    def_launcher(m, "bank_attend", &caco::bank_attend);

    Struct<caco::SelectParams>(m, "SelectParams")
        .field("keys", &caco::SelectParams::keys)
        .field("bank", &caco::SelectParams::bank)
        .field("exact_keys", &caco::SelectParams::exact_keys)
        .field("exact_bank", &caco::SelectParams::exact_bank)
        .field("index", &caco::SelectParams::index)
        .field("similarity", &caco::SelectParams::similarity)
        .field("workspace", &caco::SelectParams::workspace)
        .field("rows", &caco::SelectParams::rows)
        .field("bank_rows", &caco::SelectParams::bank_rows)
        .field("channels", &caco::SelectParams::channels)
        .field("type", &caco::SelectParams::type);
    m.def("bank_select_workspace", &caco::bank_select_workspace, "rows"_a, "bank_rows"_a, "channels"_a, "target"_a);
    def_launcher(m, "bank_select", &caco::bank_select);

    Struct<caco::StepParams>(m, "StepParams")
        .field("bank", &caco::StepParams::bank)
        .field("velocity", &caco::StepParams::velocity)
        .field("bank_operand", &caco::StepParams::bank_operand)
        .field("queries", &caco::StepParams::queries)
        .field("exact_queries", &caco::StepParams::exact_queries)
        .field("lse", &caco::StepParams::lse)
        .field("row_weight", &caco::StepParams::row_weight)
        .field("positive", &caco::StepParams::positive)
        .field("positive_weight", &caco::StepParams::positive_weight)
        .field("workspace", &caco::StepParams::workspace)
        .field("rows", &caco::StepParams::rows)
        .field("bank_rows", &caco::StepParams::bank_rows)
        .field("channels", &caco::StepParams::channels)
        .field("positives", &caco::StepParams::positives)
        .field("type", &caco::StepParams::type)
        .field("temperature", &caco::StepParams::temperature)
        .field("lr", &caco::StepParams::lr)
        .field("momentum", &caco::StepParams::momentum)
        .field("weight_decay", &caco::StepParams::weight_decay)
        .field("project", &caco::StepParams::project)
        .field("skip", &caco::StepParams::skip);
    m.def("bank_step_workspace", &caco::bank_step_workspace, "rows"_a);
    def_launcher(m, "bank_step", &caco::bank_step);

#ifdef CACO_EMULATE
    bind_emulation(m);
#endif
}
