// What the emulated module offers to tests on top of the operations: the schedule, the counters, single primitives.
#include <pybind11/pybind11.h>

#include "machine.h"

namespace py = pybind11;
using namespace py::literals;

void bind_emulation(py::module_ &m) {
    m.attr("emulated") = true;
    m.def(
        "set_schedule",
        [](unsigned seed, bool greedy, bool lazy_copies, int os_threads) {
            emu::schedule = {seed, greedy, lazy_copies, os_threads};
        },
        "seed"_a = 0, "greedy"_a = false, "lazy_copies"_a = true, "os_threads"_a = 2);
    m.def("take_counters", [] {
        py::dict counts;
        auto take = [&](const char *name, std::atomic<long> &counter) { counts[name] = counter.exchange(0); };
        take("launches", emu::counters.launches);
        take("matrix_products", emu::counters.matrix_products);
        take("matrix_loads", emu::counters.matrix_loads);
        take("bank_conflicts", emu::counters.bank_conflicts);
        take("async_copies", emu::counters.async_copies);
        take("bulk_copies", emu::counters.bulk_copies);
        take("prefetches", emu::counters.prefetches);
        take("barriers", emu::counters.barriers);
        return counts;
    });
}
