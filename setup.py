"""Builds the CUDA module caco_fast._C if nvcc is found; everything else about the package is in pyproject.toml.

    python setup.py build_ext        in place, incremental, by ninja

CACO_CUDA    auto (default): build the CUDA module if an nvcc that can do so is found; 1: fail if not; 0: leave it out
CACO_ARCHES  compute capabilities, "80;90a"; by default those of csrc/sources.py that this nvcc knows
CACO_BOUNDED_WAIT  1: kernels for sm_90a say where they wait and end, instead of hanging; for debugging, not for timing
CUDA_HOME    where to look for bin/nvcc first; then CUDA_PATH, /usr/local/cuda and PATH

The module is built and imported without torch, GPU or driver: it takes addresses and links the static CUDA runtime.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import sources  # noqa: E402

NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Xptxas -warn-spills,-warn-lmem-usage"
CXX_FLAGS = "-std=c++20 -O2 -fPIC -fvisibility=hidden -Wall"
# The end of a compiler's command in ninja; ninja learns from $out.d which headers an object depends on.
COMPILE = "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
OBJECTS = "build/kernels"


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Unusable(Exception):
    """Why an nvcc can't build the module."""


def release_of(nvcc: str) -> str:
    return output_of(nvcc, "--version").split("release ")[1].split(",")[0]


def chosen_arches(nvcc: str) -> list[str]:
    """The compute capabilities to build for. Unusable if nvcc does not run, or is too old for C++20 or all of these."""
    try:
        release, known = release_of(nvcc), output_of(nvcc, "--list-gpu-arch").replace("compute_", "").split()
        too_old = int(release.split(".")[0]) < 12
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or ["no output"]
        raise Unusable(f"{nvcc} does not work: {said[-1]}") from None
    if too_old:
        raise Unusable(f"{nvcc} is of CUDA {release}, expected 12 or later")
    # nvcc lists no compute_90a, but has it wherever it has compute_90.
    named = os.environ.get("CACO_ARCHES", "").replace(",", ";")
    arches = named.split(";") if named else sources.ARCHES
    unknown = [arch for arch in arches if arch.removesuffix("a") not in known]
    if named and unknown:
        raise SystemExit(f"error: CACO_ARCHES: found {unknown[0]!r}, expected some of {' '.join(known)}, or 90a")
    if len(unknown) == len(arches):
        raise Unusable(f"{nvcc} knows none of the architectures {' '.join(arches)}")
    return [arch for arch in arches if arch not in unknown]


def shell(*words: str) -> str:
    """Words of a command, as ninja hands them to the shell."""
    return shlex.join(words).replace("$", "$$")


def define(name: str, value: str) -> str:
    return shell(f'-D{name}="{value}"')


def ninja_path(path: str) -> str:
    """A path in ninja's `build` lines."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_rules(nvcc: str, module: str) -> str:
    """The build in ninja's language, from the repository's root: one object for each source, linked by nvcc."""
    try:
        import pybind11  # here, so that an installation without nvcc does not need it
    except ImportError:
        raise SystemExit("error: pybind11 not found; pip install pybind11 ninja") from None

    arches = chosen_arches(nvcc)
    compiler = f"nvcc {release_of(nvcc)}"
    of_arches = define("CACO_ARCHES", ";".join(arches))
    flags = NVCC_FLAGS + " -DCACO_BOUNDED_WAIT" * (os.environ.get("CACO_BOUNDED_WAIT") == "1")
    includes = shell(f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    names = define("CACO_SOURCE_HASH", sources.content_hash()) + " " + define("CACO_COMPILER", compiler)
    bindings = f"{includes} -DCACO_MODULE=_C {names}"

    def gencode(source: str) -> str:
        served = sources.arches_of(source, arches)
        return "  gencode = " + " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in served)

    # The last ones take longest, so they start first.
    longest_first = (*reversed(sources.KERNELS), sources.BINDINGS)
    nvcc, objects = shell(nvcc), [f"{OBJECTS}/{name}.o" for name in longest_first]
    lines = [
        f"builddir = {OBJECTS}",  # ninja keeps its log there
        f"rule cuda\n  command = {nvcc} {flags} $gencode {of_arches} {COMPILE}",
        f"rule cxx\n  command = {os.environ.get('CXX', 'c++')} {CXX_FLAGS} {of_arches} {bindings} {COMPILE}",
        f"rule link\n  command = {nvcc} -shared -nodlink -cudart static -Xlinker --exclude-libs,ALL $in -o $out",
        *(f"build {OBJECTS}/{name}.o: cuda csrc/{name}\n{gencode(name)}" for name in sources.KERNELS),
        f"build {OBJECTS}/{sources.BINDINGS}.o: cxx csrc/{sources.BINDINGS}",
        f"build {ninja_path(module)}: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


class BuildKernels(build_ext):
    """Writes the ninja file and runs ninja, which rebuilds only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        module, rules = Path(self.get_ext_fullpath(ext.name)).resolve(), ROOT / OBJECTS / "build.ninja"
        for folder in (module.parent, rules.parent):
            folder.mkdir(parents=True, exist_ok=True)
        rules.write_text(ninja_rules(find_nvcc(), os.path.relpath(module, ROOT)))
        ninja = shutil.which("ninja", path=sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", ""))
        if ninja is None:
            raise SystemExit("error: ninja not found; pip install ninja")
        if subprocess.run([ninja, "-C", str(ROOT), "-f", str(rules)]).returncode:
            raise SystemExit(
                "error: the CUDA module was not built; the compiler's messages are above; CACO_CUDA=0 leaves it out"
            )


def extensions() -> list[Extension]:
    choice = os.environ.get("CACO_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"error: CACO_CUDA: found {choice!r}, expected auto, 0 or 1")
    reason = "CACO_CUDA=0"
    if choice != "0":
        reason = "nvcc not found in CUDA_HOME, CUDA_PATH, /usr/local/cuda or PATH"
        if nvcc := find_nvcc():
            try:
                chosen_arches(nvcc)
                return [Extension("caco_fast._C", [f"csrc/{name}" for name in (sources.BINDINGS, *sources.KERNELS)])]
            except Unusable as error:
                reason = str(error)
    if choice == "1":
        raise SystemExit(f"error: CACO_CUDA=1 requires the CUDA module, but {reason}")
    print(f"caco_fast: the CUDA backend is left out: {reason}", file=sys.stderr)
    return []


# `python setup.py build_ext` builds in place; a wheel takes the module from a folder of its own.
in_place = "build_ext" in sys.argv
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels}, options={"build_ext": {"inplace": in_place}})
