"""What the CUDA module is built from: one list for setup.py, the emulated build of the tests and the checks."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent

BINDINGS = "bindings.cpp"
KERNELS = (
    "bank.cu",
    "stages.cu",
    "optim/tensor_table.cu",
    "optim/ema_update.cu",
    "optim/lars_step.cu",
    "sm70/bank_attend.cu",
    "sm70/bank_select.cu",
    "sm70/bank_step.cu",
    "sm80/bank_attend.cu",
    "sm80/bank_select.cu",
    "sm80/bank_step.cu",
    "sm90/bank_attend.cu",
    "sm90/bank_select.cu",
    "sm90/bank_step.cu",
)
# Machine code for sm_XY also runs on later minor numbers: 70 serves 72 and 75, 80 serves 86 and 89, 100 serves 103, 120
# serves 121. That for sm_90a runs on sm_90 only. nvcc 13 does not know 70.
ARCHES = ("70", "80", "90a", "100", "120")
# Which of the architectures the kernels of a source are for; on others they are empty. The rest are for all.
SERVED = {
    "bank.cu": lambda arch: False,
    "sm70/": lambda arch: compute_capability(arch) < 80,
    "sm80/": lambda arch: compute_capability(arch) >= 80,
    "sm90/": lambda arch: arch == "90a",
}


def compute_capability(arch: str) -> int:
    return int(arch.rstrip("a"))


def arches_of(source: str, arches: list[str]) -> list[str]:
    """Those of `arches` that a source is worth compiling for; one at least, for its launchers."""
    for start, serves in SERVED.items():
        if source.startswith(start):
            return [arch for arch in arches if serves(arch)] or arches[:1]
    return arches


def content_hash() -> str:
    """A hash of every source of the kernels, emulation included: names what was built, run or measured."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*")):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h"):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
