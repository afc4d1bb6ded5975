"""The static gate of the compiled kernels: no spills, no local memory, the matrix instruction where it belongs.

    python tools/check/sass.py [MODULE.so]       the compiled module, by default caco_fast/_C of this tree
    python tools/check/sass.py --sm70            the kernels for sm_70 (V100), which CUDA 13 cannot compile

The first form needs cuobjdump and nvdisasm. They come with CUDA, with the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm, or with triton, which is a part of torch for CUDA. The second form compiles the sources by NVRTC
and ptxas of CUDA 12, which work next to CUDA 13 and without a GPU:

    pip install --target cuda12 nvidia-cuda-{nvrtc,runtime,cccl,nvcc}-cu12==12.9.*
    CACO_CUDA12=cuda12 python tools/check/sass.py --sm70

CACO_CUDA12  the folder of that installation; by default the packages of this environment are looked for

Prints the registers of each kernel on each architecture, the shared memory, the spills, and each kernel that breaks a
rule. Returns 1 if a kernel breaks a rule, and 2 if a tool or the module is missing.
"""

import argparse
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tools" / "check")]
import sass_walk  # noqa: E402
import sources  # noqa: E402

# The path of a kernel with a tile loop, and the matrix instruction that its code must contain: HMMA.884 is mma.m8n8k4,
# HMMA.16816 is mma.m16n8k16 of fp16 or bf16, HGMMA is wgmma. The code for sm_70 is PTX if it is made by NVRTC.
MATRIX_KERNELS = re.compile(r"(?=.*?\d(sm70|sm80|sm90)\d).*(attend|select|step)_kernel")
MATRIX_INSTRUCTION = {"sm70": "HMMA.884", "sm80": "HMMA.16816", "sm90": "HGMMA"}
IN_PTX = {"HMMA.884": "mma.sync.aligned.m8n8k4"}
# Registers that a warpgroup of sm90's kernels has left after setmaxnreg: one gives back, two take.
REGISTERS_AFTER = re.compile(r"USETMAXREG\.(DEALLOC|TRY_ALLOC)\b.*?(0x[0-9a-f]+)")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")
MOST_REGISTERS = 255


@dataclass
class Kernel:
    arch: str
    symbol: str
    registers: int
    stack: int
    local: int
    code: list[str] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)  # of the code; none for PTX

    @property
    def name(self) -> str:
        kernel = re.search(r"\d+([a-z_]+_kernel)", self.symbol).group(1)
        operand = "bf16" if "__nv_bfloat16" in self.symbol else "fp16" if "__half" in self.symbol else ""
        padded = re.search(r"Li(\d+)E", self.symbol)
        title = f"{kernel.removesuffix('_kernel')} {self.path}{' 2t' if 'Lb1E' in self.symbol else ''}"
        return f"{title:<14} {operand:<5} {padded.group(1) if padded else '':>4}"

    @property
    def path(self) -> str:
        found = MATRIX_KERNELS.search(self.symbol)
        return found.group(1) if found else ""

    def is_compiled(self) -> bool:
        """Whether the kernel has a body: on the architectures of another path it is empty."""
        number = int(re.match(r"\d+", self.arch).group())
        return {"sm70": number < 80, "sm80": number >= 80, "sm90": self.arch == "90a"}.get(self.path, True)

    def has_matrix_instruction(self) -> bool:
        instruction = MATRIX_INSTRUCTION[self.path]
        names = (instruction, IN_PTX.get(instruction, instruction))
        return any(re.search(rf"\b{re.escape(name)}\b", line) for line in self.code for name in names)

    def walk(self) -> sass_walk.Code:
        return sass_walk.Code(self.addresses, self.code)

    def faults(self) -> list[str]:
        code = "\n".join(self.code)
        faults = []
        if self.stack or self.local:
            faults.append(f"stack {self.stack} B, local memory {self.local} B")
        if LOCAL_MEMORY.search(code):
            faults.append(f"{len(LOCAL_MEMORY.findall(code))} local loads or stores")
        if self.registers > MOST_REGISTERS:
            faults.append(f"{self.registers} registers")
        if not code:
            faults.append("no machine code found")
        elif self.path and not self.has_matrix_instruction():
            faults.append(f"no {MATRIX_INSTRUCTION[self.path]}")
        # At P = 64 a tile has four products, and select has five waits for every four tiles.
        elif 2 * code.count("WARPGROUP.DEPBAR") > len(re.findall(r"\bHGMMA\b", code)) > 0:
            faults.append("wgmma waited for one by one: ptxas has serialised them, see its messages C7510 to C7518")
        elif self.path == "sm90":
            after = {kind: int(count, 16) for kind, count in REGISTERS_AFTER.findall(code)}
            if len(after) < 2:
                faults.append("no setmaxnreg: ptxas has ignored it, see its message C7508")
            elif after["DEALLOC"] + 2 * after["TRY_ALLOC"] > 3 * self.registers:
                faults.append(f"setmaxnreg beyond the {self.registers} registers of the launch: it would wait for ever")
            elif self.addresses and (used := self.walk().registers_after("USETMAXREG.DEALLOC")) > after["DEALLOC"]:
                faults.append(f"the copying warps use {used} registers of the {after['DEALLOC']} that they keep")
        if self.path == "sm90" and "attend" in self.symbol and self.addresses:
            loop = self.walk().tile_loop("HGMMA")
            if late := sass_walk.late_exponentials(loop):
                faults.append(f"{late} exponentials after the loop's last wait for products, expected none: see `hold`")
        return faults


def find_tool(name: str) -> str | None:
    folders = [f"{os.environ[home]}/bin" for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ]
    folders += ["/usr/local/cuda/bin", *os.environ.get("PATH", "").split(os.pathsep)]
    for package, inside in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for location in spec.submodule_search_locations or () if spec else ():
            folders += map(str, Path(location).glob(inside))
    return shutil.which(name, path=os.pathsep.join(folders))


def find_module() -> Path | None:
    return next((ROOT / "caco_fast").glob("_C.*.so"), None)


def dump(tool: str, option: str, module: Path) -> str:
    # nvdisasm is called by cuobjdump and must be found by it.
    path = os.pathsep.join([str(Path(find_tool("nvdisasm")).parent), os.environ.get("PATH", "")])
    done = subprocess.run([tool, option, str(module)], capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise SystemExit(f"error: {tool} {option} {module}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def read_kernels(module: Path) -> list[Kernel]:
    tool = find_tool("cuobjdump")
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = symbol = ""
    named: dict[str, str] = {}  # the listing of machine code calls sm_90a sm_90
    for line in dump(tool, "-res-usage", module).splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found.group(1)
            named[re.match(r"\d+", arch).group()] = arch
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found.group(1)
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernels[arch, symbol] = Kernel(arch, symbol, usage["REG"], usage["STACK"], usage["LOCAL"])
    code: list[str] = []
    addresses: list[int] = []
    for line in dump(tool, "-sass", module).splitlines():
        if found := re.match(r"\s*code for sm_(\d+)", line):
            arch = named[found.group(1)]
        elif found := re.match(r"\s*Function : (\S+)", line):
            code, addresses = kernels[arch, found.group(1)].code, kernels[arch, found.group(1)].addresses
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            addresses.append(int(found.group(1), 16))
            code.append(found.group(2).strip())
    return in_order(kernels.values())


def in_order(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The kernels that have a body, by architecture and name."""
    present = [kernel for kernel in kernels if kernel.is_compiled()]
    return sorted(present, key=lambda kernel: (int(re.match(r"\d+", kernel.arch).group()), kernel.name))


def shared_bytes(module: Path) -> Callable[[str, int, int], int]:
    """A function of operation, channels and path that returns the bytes of shared memory per block."""
    spec = importlib.util.spec_from_file_location("_C", module)
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    return lambda operation, channels, path: compiled.shared_bytes(channels, path).get(operation, "")


def print_table(kernels: list[Kernel], shared: Callable[[str, int, int], int] | None = None) -> None:
    """Print a row per kernel: registers per thread on each architecture, bytes of shared memory per block, and bytes of
    stack and local memory per thread on the architecture that has most. Spills are in the last column."""
    arches = list(dict.fromkeys(kernel.arch for kernel in kernels))
    registers = {(kernel.name, kernel.arch): kernel.registers for kernel in kernels}
    spills = {name: max(k.stack + k.local for k in kernels if k.name == name) for name, _ in registers}
    columns = "".join(f"{'sm_' + arch:>8}" for arch in arches)
    print(f"{'kernel':<14} {'type':<5} {'P':>4}  {columns}{'shared':>9}{'spills':>8}")
    for name, path in dict.fromkeys((kernel.name, kernel.path) for kernel in kernels):
        block = shared(name.split()[0], int(name.split()[-1]), int(path[2:])) if path and shared else ""
        cells = "".join(f"{registers.get((name, arch), '-'):>8}" for arch in arches)
        print(f"{name}  {cells}{block:>9}{spills[name]:>8}")


def missing() -> str | None:
    """The reason why the gate cannot run here, or None."""
    for tool in ("cuobjdump", "nvdisasm"):
        if find_tool(tool) is None:
            return f"{tool} not found; pip install nvidia-cuda-{tool}"
    return None


# sm_70, by NVRTC and ptxas of CUDA 12

FILES = {  # the file that is needed of each package, in its folder `nvidia`
    "nvidia-cuda-nvrtc-cu12": "cuda_nvrtc/lib/libnvrtc.so.12",
    "nvidia-cuda-nvcc-cu12": "cuda_nvcc/bin/ptxas",
    "nvidia-cuda-runtime-cu12": "cuda_runtime/include/cuda_fp16.h",
    "nvidia-cuda-cccl-cu12": "cuda_cccl/include/cuda/std/type_traits",
}
# NVRTC has no standard headers of the host; these are the parts that the sources use.
IN_STD = "namespace std { using namespace cuda::std; }\n"
HEADERS = {
    "cstdint": f"#include <cuda/std/cstdint>\n{IN_STD}using namespace cuda::std;\n",
    "type_traits": f"#include <cuda/std/type_traits>\n{IN_STD}",
    "algorithm": "namespace std {\n"
    "template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }\n"
    "template <class T> constexpr T clamp(T x, T low, T high) { return x < low ? low : high < x ? high : x; }\n}\n",
}
OPTIONS = (
    "--gpu-architecture=compute_70",
    "--std=c++20",
    "-default-device",  # so that NVRTC accepts the launchers; nothing runs them
    "-DINFINITY=__int_as_float(0x7f800000)",
    "-DNAN=__int_as_float(0x7fffffff)",
)


def packages() -> Path | None:
    """The folder `nvidia` that holds all of FILES, or None."""
    named = os.environ.get("CACO_CUDA12")
    spec = None if named else importlib.util.find_spec("nvidia")
    folders = [Path(named) / "nvidia"] if named else map(Path, spec.submodule_search_locations or () if spec else ())
    return next((folder for folder in folders if all((folder / file).exists() for file in FILES.values())), None)


def missing_for_sm70() -> str | None:
    """The reason why the gate of sm_70 cannot run here, or None."""
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


def read_kernels_of_sm70(nvidia: Path) -> list[Kernel]:
    """Compile the sources for sm_70; return what ptxas says of each kernel, with its PTX as code."""
    kernels = []
    for source in sources.KERNELS:
        if "70" not in sources.arches_of(source, ["90a", "70"]):
            continue
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
            kernels.append(Kernel("70", symbol, registers, spills, 0, bodies[symbol].splitlines()))
    return in_order(kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module", nargs="?", type=Path, default=find_module(), help="compiled module of the kernels")
    parser.add_argument("--sm70", action="store_true", help="compile for sm_70 by CUDA 12 and check that instead")
    options = parser.parse_args()
    module = options.module
    if not options.sm70 and (module is None or not module.exists()):
        print("error: no compiled module; run `python setup.py build_ext`", file=sys.stderr)
        return 2
    if reason := missing_for_sm70() if options.sm70 else missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    kernels = read_kernels_of_sm70(packages()) if options.sm70 else read_kernels(module)
    print_table(kernels, None if options.sm70 else shared_bytes(module))
    broken = [(kernel, kernel.faults()) for kernel in kernels if kernel.faults()]
    for kernel, faults in broken:
        print(f"sm_{kernel.arch} {kernel.name}: {'; '.join(faults)}")
    print(f"{len(kernels)} kernels, {len(broken)} that break a rule (stack, spills, local memory, matrix instruction)")
    return 1 if broken or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
