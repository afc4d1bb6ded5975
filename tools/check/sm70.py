"""The static gate of the sm_70 (V100) kernels, which CUDA 13 cannot compile: NVRTC and ptxas 12 do, without a GPU.

    pip install --target cuda12 nvidia-cuda-{nvrtc,runtime,cccl,nvcc}-cu12==12.9.*
    CACO_CUDA12=cuda12 python tools/check/sm70.py

CACO_CUDA12  the folder of that installation; by default the packages of this environment are looked for

Prints registers per thread of each kernel, and what breaks a rule: a spill, local memory, more registers than let two
blocks of a tile kernel run at once, no mma.m8n8k4 in a tile kernel. Returns 1 if one does, 2 without the packages.
"""

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("stages.cu", "sm70/bank_attend.cu", "sm70/bank_select.cu", "sm70/bank_step.cu")
SOURCES += ("optim/tensor_table.cu", "optim/ema_update.cu", "optim/lars_step.cu")
FILES = {  # what is needed of each package, in its folder of `nvidia`
    "nvidia-cuda-nvrtc-cu12": "cuda_nvrtc/lib/libnvrtc.so.12",
    "nvidia-cuda-nvcc-cu12": "cuda_nvcc/bin/ptxas",
    "nvidia-cuda-runtime-cu12": "cuda_runtime/include/cuda_fp16.h",
    "nvidia-cuda-cccl-cu12": "cuda_cccl/include/cuda/std/type_traits",
}
# The host's standard headers, as far as the sources use them: NVRTC has none.
IN_STD = "namespace std { using namespace cuda::std; }\n"
HEADERS = {
    "cstdint": f"#include <cuda/std/cstdint>\n{IN_STD}using namespace cuda::std;\n",
    "type_traits": f"#include <cuda/std/type_traits>\n{IN_STD}",
    "algorithm": "namespace std {\n"
    "template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }\n"
    "template <class T> constexpr T clamp(T x, T low, T high) { return x < low ? low : high < x ? high : x; }\n}\n",
}
OPTIONS = (
    "--gpu-architecture=compute_70",
    "--std=c++20",
    "-default-device",  # NVRTC takes the launchers for device functions: nothing runs them
    "-DINFINITY=__int_as_float(0x7f800000)",
    "-DNAN=__int_as_float(0x7fffffff)",
)
# 65536 registers of a multiprocessor for two blocks of 128 threads, or as stages.cu's launch bounds say.
MOST_REGISTERS = 255


@dataclass
class Kernel:
    symbol: str
    registers: int
    spills: int  # bytes, with stack and local memory
    uses_mma: bool

    @property
    def name(self) -> str:
        kernel = re.search(r"\d+([a-z_]+)_kernel", self.symbol).group(1)
        padded = re.search(r"Li(\d+)E", self.symbol)
        operand = "bf16" if "__nv_bfloat16" in self.symbol else "fp16" if "__half" in self.symbol else ""
        return f"{kernel:<12} {operand:<5} {padded.group(1) if padded else '':>4}"

    def faults(self) -> list[str]:
        faults = []
        if self.spills:
            faults.append(f"{self.spills} bytes of stack, spills or local memory")
        if self.registers > MOST_REGISTERS:
            faults.append(f"{self.registers} registers")
        if "sm70" in self.symbol and not self.uses_mma:
            faults.append("no mma.m8n8k4")
        return faults


def packages() -> Path | None:
    """The folder `nvidia` that holds all of FILES, or None."""
    named = os.environ.get("CACO_CUDA12")
    spec = None if named else importlib.util.find_spec("nvidia")
    folders = [Path(named) / "nvidia"] if named else map(Path, spec.submodule_search_locations or () if spec else ())
    return next((folder for folder in folders if all((folder / file).exists() for file in FILES.values())), None)


def missing() -> str | None:
    """Why the gate cannot run here, or None."""
    if packages():
        return None
    return f"NVRTC and ptxas 12 not found; pip install --target FOLDER {' '.join(FILES)} and set CACO_CUDA12=FOLDER"


def compile_to_ptx(source: str, nvidia: Path) -> str:
    nvrtc = ctypes.CDLL(str(nvidia / FILES["nvidia-cuda-nvrtc-cu12"]))

    def text(what: str) -> str:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode()

    def strings(values) -> ctypes.Array:
        return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))

    program = ctypes.c_void_p()
    unit = f'#include "{source}"\n'.encode()
    texts, names = strings(HEADERS.values()), strings(HEADERS)
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), unit, b"unit.cu", len(HEADERS), texts, names):
        raise SystemExit(f"error: NVRTC refused {source}")
    includes = [f"-I{nvidia / package / 'include'}" for package in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]
    options = [*OPTIONS, f"-I{ROOT / 'csrc'}", *includes]
    if nvrtc.nvrtcCompileProgram(program, len(options), strings(options)):
        raise SystemExit(f"error: csrc/{source} does not compile for sm_70:\n{text('ProgramLog')}")
    return text("PTX")


def read_kernels(nvidia: Path) -> list[Kernel]:
    """Compiles SOURCES for sm_70 and returns what ptxas says of each kernel."""
    kernels = []
    for source in SOURCES:
        ptx = compile_to_ptx(source, nvidia)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "unit.ptx"
            file.write_text(ptx)
            command = [str(nvidia / FILES["nvidia-cuda-nvcc-cu12"]), "-v", "-arch=sm_70", str(file), "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: csrc/{source}: {done.stderr.strip()}")
        bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.DOTALL))
        for entry in re.split(r"Compiling entry function ", done.stderr)[1:]:
            symbol = re.match(r"'(\w+)'", entry).group(1)
            spills = sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill|lmem)", entry)))
            registers = int(re.search(r"Used (\d+) registers", entry).group(1))
            kernels.append(Kernel(symbol, registers, spills, "mma.sync.aligned.m8n8k4" in bodies[symbol]))
    return kernels


def main() -> int:
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    kernels = read_kernels(packages())
    print(f"{'kernel':<12} {'type':<5} {'P':>4}{'sm_70':>8}")
    for kernel in sorted(kernels, key=lambda kernel: kernel.name):
        print(f"{kernel.name}{kernel.registers:>8}  {'; '.join(kernel.faults())}".rstrip())
    broken = sum(bool(kernel.faults()) for kernel in kernels)
    print(f"{len(kernels)} kernels, {broken} that break a rule (stack, spills, local memory, registers, no mma.m8n8k4)")
    return 1 if broken or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
