"""The static gate of the compiled kernels: no spills, no local memory, the matrix instruction where it belongs.

    python tools/check/sass.py [MODULE.so]          by default the caco_fast/_C module of this tree

Prints the registers per kernel and architecture, the shared memory, the spills, and what breaks a rule. Returns 1 if a
kernel breaks one, 2 if the tools or the module are not there. Needs cuobjdump and nvdisasm: of CUDA, of the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or those that triton (a part of CUDA torch) brings along.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The path of a kernel of the tile loops, and what its machine code must contain: HMMA.884 is mma.m8n8k4 (which
# tools/check/sm70.py looks at, where nvcc has no sm_70), HMMA.16816 is mma.m16n8k16 of fp16 or bf16, HGMMA is wgmma.
MATRIX_KERNELS = re.compile(r"(?=.*?\d(sm70|sm80|sm90)\d).*(attend|select|step)_kernel")
MATRIX_INSTRUCTION = {"sm70": "HMMA.884", "sm80": "HMMA.16816", "sm90": "HGMMA"}
# Paths whose kernels are empty but on one architecture.
ONLY_ON = {"sm90": "90a"}
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
        elif self.path and not re.search(rf"\b{re.escape(MATRIX_INSTRUCTION[self.path])}\b", code):
            faults.append(f"no {MATRIX_INSTRUCTION[self.path]}")
        elif 4 * code.count("WARPGROUP.DEPBAR") > len(re.findall(r"\bHGMMA\b", code)) > 0:
            faults.append("wgmma waited for one by one: ptxas has serialised them, see its messages C7510 to C7518")
        elif self.path == "sm90":
            after = {kind: int(count, 16) for kind, count in REGISTERS_AFTER.findall(code)}
            if len(after) < 2:
                faults.append("no setmaxnreg: ptxas has ignored it, see its message C7508")
            elif after["DEALLOC"] + 2 * after["TRY_ALLOC"] > 3 * self.registers:
                faults.append(f"setmaxnreg beyond the {self.registers} registers of the launch: it would wait for ever")
        return faults


def is_compiled(symbol: str, arch: str) -> bool:
    """Whether the kernel has a body there: on the architectures of another path it is empty."""
    number = int(re.match(r"\d+", arch).group())
    return number < 80 if "sm70" in symbol else number >= 80 if "sm80" in symbol else True


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
    for line in dump(tool, "-sass", module).splitlines():
        if found := re.match(r"\s*code for sm_(\d+)", line):
            arch = named[found.group(1)]
        elif found := re.match(r"\s*Function : (\S+)", line):
            code = kernels[arch, found.group(1)].code
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found.group(1))
    present = [
        kernel
        for kernel in kernels.values()
        if ONLY_ON.get(kernel.path, kernel.arch) == kernel.arch and is_compiled(kernel.symbol, kernel.arch)
    ]
    return sorted(present, key=lambda kernel: (int(re.match(r"\d+", kernel.arch).group()), kernel.name))


def print_table(kernels: list[Kernel], module: Path) -> None:
    """A row per kernel: registers per thread on each architecture, bytes of shared memory per block, bytes of stack and
    local memory per thread (spills are there) on the architecture that has most."""
    spec = importlib.util.spec_from_file_location("_C", module)
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    arches = list(dict.fromkeys(kernel.arch for kernel in kernels))
    registers = {(kernel.name, kernel.arch): kernel.registers for kernel in kernels}
    spills = {name: max(k.stack + k.local for k in kernels if k.name == name) for name, _ in registers}
    columns = "".join(f"{'sm_' + arch:>8}" for arch in arches)
    print(f"{'kernel':<14} {'type':<5} {'P':>4}  {columns}{'shared':>9}{'spills':>8}")
    for name, path in dict.fromkeys((kernel.name, kernel.path) for kernel in kernels):
        op, padded = name.split()[0], name.split()[-1]
        shared = compiled.shared_bytes(int(padded), int(path[2:])).get(op, "") if path else ""
        cells = "".join(f"{registers.get((name, arch), '-'):>8}" for arch in arches)
        print(f"{name}  {cells}{shared:>9}{spills[name]:>8}")


def missing() -> str | None:
    """Why the gate cannot run here, or None."""
    for tool in ("cuobjdump", "nvdisasm"):
        if find_tool(tool) is None:
            return f"{tool} not found; pip install nvidia-cuda-{tool}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module", nargs="?", type=Path, default=find_module())
    module = parser.parse_args().module
    if module is None or not module.exists():
        print("error: no compiled module; run `python setup.py build_ext`", file=sys.stderr)
        return 2
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    kernels = read_kernels(module)
    print_table(kernels, module)
    broken = [(kernel, kernel.faults()) for kernel in kernels if kernel.faults()]
    for kernel, faults in broken:
        print(f"sm_{kernel.arch} {kernel.name}: {'; '.join(faults)}")
    print(f"{len(kernels)} kernels, {len(broken)} that break a rule (stack, spills, local memory, matrix instruction)")
    return 1 if broken or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
