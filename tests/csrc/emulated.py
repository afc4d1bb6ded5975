"""Builds the kernels for the CPU: the sources of csrc/ under g++ with csrc/emulation in place of CUDA.

The objects stay in build/emulated/, so that a second session compiles only what has changed.
"""

import importlib.util
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import sources

FLAGS = "-std=c++20 -O2 -fPIC -pthread -DCACO_EMULATE -Wall -Wextra -Wno-unknown-pragmas"
SANITIZERS = {
    "": "",
    "address": "-O1 -g1 -fsanitize=address",
    "thread": "-O1 -g1 -fsanitize=thread -Wno-tsan",
}


def missing_tool() -> str | None:
    """Why the emulated build cannot run here, or None."""
    if sys.platform != "linux" or sysconfig.get_platform() != "linux-x86_64":
        return f"the emulation of CUDA needs Linux on x86-64, found {sysconfig.get_platform()}"
    for tool in ("g++", "ninja"):
        if find_tool(tool) is None:
            return f"{tool} not found"
    return None


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def run_ninja(folder: Path, rules: list[str], target: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    done = subprocess.run([find_tool("ninja"), "-C", str(folder), target], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated build failed:\n{done.stdout}\n{done.stderr}")
    return folder / target


def compile_rules(flags: str, link_flags: str) -> list[str]:
    return [
        "rule compile",
        f"  command = g++ {flags} $extra -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ {link_flags} -pthread $in -o $out",
    ]


def build_module() -> ModuleType:
    """caco_fast._C with emulated kernels, under the name `caco_emulated`."""
    import pybind11

    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    defines = " ".join(
        shlex.quote(f'-D{name}="{value}"')
        for name, value in (("CACO_SOURCE_HASH", ""), ("CACO_COMPILER", "g++, emulated"), ("CACO_ARCHES", "70;80;90a"))
    )
    rules = compile_rules(f"{FLAGS} -fvisibility=hidden -ftls-model=initial-exec", "-shared")
    objects = []
    for name in (*sources.KERNELS, sources.BINDINGS, "emulation/bind.cpp"):
        rules += [
            f"build {name}.o: compile {sources.ROOT / name}",
            f"  extra = -DCACO_MODULE=caco_emulated {includes} {defines}",
        ]
        objects.append(f"{name}.o")
    rules.append("build caco_emulated.so: link " + " ".join(objects))
    path = run_ninja(ROOT / "build" / "emulated", rules, "caco_emulated.so")
    spec = importlib.util.spec_from_file_location("caco_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_program(source: Path, sanitizer: str = "", kernels: bool = True) -> Path:
    """An executable of one C++ test source, with the emulated kernels if it uses them, under one of SANITIZERS."""
    rules = compile_rules(f"{FLAGS} -I{sources.ROOT} {SANITIZERS[sanitizer]}", SANITIZERS[sanitizer])
    objects = [f"{source.name}.o"]
    rules.append(f"build {source.name}.o: compile {source}")
    for name in sources.KERNELS if kernels else ():
        rules += [
            f"build {name}.o: compile {sources.ROOT / name}",
            "  extra = " + shlex.quote('-DCACO_ARCHES="70;80;90a"'),
        ]
        objects.append(f"{name}.o")
    rules.append(f"build {source.stem}: link " + " ".join(objects))
    return run_ninja(ROOT / "build" / "emulated" / f"{source.stem}-{sanitizer or 'plain'}", rules, source.stem)
