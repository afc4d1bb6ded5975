"""The sources of the CUDA module: one list for setup.py, the emulated build of the tests, and the checks."""

import hashlib
from pathlib import Path, PurePath

ROOT = Path(__file__).resolve().parent

BINDINGS = "bindings.cpp"
KERNELS = (
    "dispatch.cu",
    "operand.cu",
    "bank_attend/merge.cu",
    "bank_attend/sm70_sm80.cu",
    "bank_attend/sm90.cu",
    "bank_select/settle.cu",
    "bank_select/sm70_sm80.cu",
    "bank_select/sm90.cu",
    "bank_step/row_terms.cu",
    "bank_step/sm70_sm80.cu",
    "bank_step/sm90.cu",
)
# Machine code for sm_XY also runs on later minor numbers: 70 serves 72 and 75, 80 serves 86 and 89, 100 serves 103, and
# 120 serves 121. Machine code for sm_90a runs on sm_90 only. nvcc 13 does not know 70.
ARCHES = ("70", "80", "90a", "100", "120")
# The architectures that a source is for, by its file name. A source that is not named here is for all of them.
SERVED = {
    "dispatch.cu": (),  # code of the host alone
    "sm90.cu": ("90a",),  # elsewhere its kernels are empty
}


def arches_of(source: str, arches: list[str]) -> list[str]:
    """The members of `arches` that a source is compiled for. There is at least one, for the launchers in the source."""
    served = SERVED.get(PurePath(source).name, arches)
    return [arch for arch in arches if arch in served] or arches[:1]


def content_hash() -> str:
    """A hash over every source of the kernels, which names what was built, run or measured."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*")):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h"):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
