"""Builds the kernels for the CPU: the sources of csrc/ under g++, with tests/emulation in place of CUDA.

`python -m tests.emulation.build` builds all of it ahead of the tests, which else build what they need.

There is one folder of objects for each set of flags, build/emulated/{plain,address,thread}. The module and all programs
of these flags share it, and so do all test sessions: each compiles only what has changed, and waits for the others.
"""

import fcntl
import importlib.util
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import sources

FLAGS = "-std=c++20 -O2 -fPIC -pthread -fvisibility=hidden -ftls-model=initial-exec -Wall -Wextra -Wno-unknown-pragmas"
FLAGS += f" -DCACO_EMULATE -I{ROOT / 'csrc'} -I{ROOT / 'tests'} " + shlex.quote('-DCACO_ARCHES="70;80;90a"')
SANITIZERS = {
    "": "",
    "address": "-O1 -g1 -fsanitize=address",
    "thread": "-O1 -g1 -fsanitize=thread -Wno-tsan",
}
MODULE = "caco_emulated.so"
# The programs, and whether they are linked with the kernels.
PROGRAMS = {
    "kernels_program.cpp": True,
    "planted.cpp": False,
    "planted_sm90.cpp": False,
    "primitives_check_sm70.cu": False,
    "primitives_check_sm80.cu": False,
    "primitives_check_sm90.cu": False,
}


def missing_tool() -> str | None:
    """The reason why the emulated build cannot run here, or None."""
    if sys.platform != "linux" or sysconfig.get_platform() != "linux-x86_64":
        return f"the emulation of CUDA needs Linux on x86-64, found {sysconfig.get_platform()}"
    for tool in ("g++", "ninja"):
        if find_tool(tool) is None:
            return f"{tool} not found"
    return None


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def build_module() -> ModuleType:
    """Build and load caco_fast._C with emulated kernels, under the name `caco_emulated`."""
    path = run_ninja("", MODULE)
    spec = importlib.util.spec_from_file_location("caco_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_program(source: str, sanitizer: str = "") -> Path:
    """Build one of PROGRAMS under one of SANITIZERS; return the executable."""
    return run_ninja(sanitizer, Path(source).stem)


def run_ninja(sanitizer: str, target: str) -> Path:
    folder = ROOT / "build" / "emulated" / (sanitizer or "plain")
    folder.mkdir(parents=True, exist_ok=True)
    rules = ninja_rules(sanitizer)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of tests would write the same objects
        (folder / "build.ninja").write_text(rules)
        done = subprocess.run([find_tool("ninja"), "-C", str(folder), target], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated build failed:\n{done.stdout}\n{done.stderr}")
    return folder / target


def ninja_rules(sanitizer: str) -> str:
    """The build in ninja's language: every object, program and module of these flags."""
    lines = [
        "rule compile",
        f"  command = g++ {FLAGS} {SANITIZERS[sanitizer]} $extra -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ {SANITIZERS[sanitizer]} $extra -pthread $in -o $out",
    ]
    kernels = [f"kernels/{name}.o" for name in reversed(sources.KERNELS)]  # the longest first
    lines += [f"build kernels/{name}.o: compile {sources.ROOT / name}" for name in sources.KERNELS]
    for name, with_kernels in PROGRAMS.items():
        objects = " ".join([f"{name}.o", *(kernels if with_kernels else ())])
        lines += [f"build {name}.o: compile {HERE / name}", f"build {Path(name).stem}: link {objects}"]
    if not sanitizer:
        lines += module_rules(kernels)
    return "\n".join(lines) + "\n"


def module_rules(kernels: list[str]) -> list[str]:
    import pybind11

    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    defines = " ".join(
        shlex.quote(f'-D{name}="{value}"')
        for name, value in (("CACO_SOURCE_HASH", ""), ("CACO_COMPILER", "g++, emulated"))
    )
    binding = {f"{sources.BINDINGS}.o": sources.ROOT / sources.BINDINGS, "bind.cpp.o": HERE / "bind.cpp"}
    lines = [f"build {MODULE}: link {' '.join([*binding, *kernels])}", "  extra = -shared"]
    for name, source in binding.items():
        lines += [
            f"build {name}: compile {source}",
            f"  extra = -DCACO_MODULE=caco_emulated {includes} {defines}",
        ]
    return lines


if __name__ == "__main__":
    if reason := missing_tool():
        sys.exit(f"error: {reason}")
    run_ninja("", MODULE)
    for flags in SANITIZERS:
        for program in PROGRAMS:
            # The primitives are checked without a sanitizer.
            if not flags or program.endswith(".cpp"):
                build_program(program, flags)
