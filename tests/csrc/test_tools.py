"""The static gate of the compiled module."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tool import load_tool

check_sass = load_tool("check/sass")
check_sm70 = load_tool("check/sm70")

ROOT = Path(__file__).resolve().parents[2]
PADDED = ("64", "128", "256", "512")  # channels that kernels are compiled for

SETMAXNREG = ["USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ", "USETMAXREG.DEALLOC.CTAPOOL 0x18 "]


def test_compiled_kernels_pass_the_static_gate():
    """No spills or local memory, and the matrix instruction where it belongs, on every architecture built."""
    if reason := check_sass.missing():
        pytest.skip(reason)
    module = check_sass.find_module()
    if module is None:
        pytest.skip("no compiled module; run `python setup.py build_ext`")
    kernels = check_sass.read_kernels(module)
    assert kernels
    assert {f"sm_{kernel.arch} {kernel.name}": kernel.faults() for kernel in kernels if kernel.faults()} == {}


def test_every_operation_is_compiled_for_its_own_path():
    """On sm_90a by sm90's kernels and by sm80's, on the other architectures by sm80's; for each type and size."""
    module = check_sass.find_module()
    if module is None or check_sass.missing():
        pytest.skip("no compiled module; run `python setup.py build_ext`")
    found = {(kernel.arch, *kernel.name.split()) for kernel in check_sass.read_kernels(module)}
    for arch in {arch for arch, *_ in found if int(arch.rstrip("a")) >= 80}:
        for path in ("sm80", "sm90") if arch == "90a" else ("sm80",):
            for kernel in itertools.product(("attend", "select", "step"), (path,), ("bf16", "fp16"), PADDED):
                assert (arch, *kernel) in found


def test_sm70_kernels_pass_the_static_gate():
    """Compiled by NVRTC and ptxas 12: no spills or local memory, and mma.m8n8k4 in every tile kernel."""
    if reason := check_sm70.missing():
        pytest.skip(reason)
    kernels = check_sm70.read_kernels(check_sm70.packages())
    assert sum("sm70" in kernel.symbol for kernel in kernels) == 3 * 4
    assert {kernel.name: kernel.faults() for kernel in kernels if kernel.faults()} == {}


@pytest.mark.parametrize(
    "fault, registers, spills, uses_mma",
    [("8 bytes of stack", 40, 8, True), ("256 registers", 256, 0, True), ("no mma.m8n8k4", 40, 0, False)],
)
def test_sm70_gate_finds_a_fault(fault, registers, spills, uses_mma):
    kernel = check_sm70.Kernel("_ZN4caco13attend_kernelINS_4TileINS_4sm70Li256E", registers, spills, uses_mma)
    assert len(kernel.faults()) == 1 and fault in kernel.faults()[0]


@pytest.mark.parametrize("gpu, path", [((7, 0), 70), ((7, 5), 70), ((8, 6), 80), ((6, 1), 0), ((9, 0), 90)])
def test_a_gpu_is_served_by_the_path_compiled_for_it(emulated, gpu, path):
    assert emulated.arches == ["70", "80", "90a"]
    assert emulated.path_serving(*gpu) == path


@pytest.mark.parametrize(
    "gpu, words",
    [
        ((7, 0), "V is sm_70, built for 70;80;90a: rebuild with CACO_ARCHES=70 and nvcc 12, as CUDA 13 has no sm_70"),
        ((7, 5), "V is sm_75, built for 70;80;90a: rebuild with CACO_ARCHES=75"),
        ((6, 1), "V is sm_61, the kernels need sm_70 or later"),
    ],
)
def test_a_gpu_without_kernels_is_told_what_to_do(cuda_ops, monkeypatch, gpu, words):
    monkeypatch.setattr(cuda_ops, "available", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V")
    assert cuda_ops.why_not(torch.device("cuda")) == words


def test_bfloat16_operands_are_refused_where_there_are_none(emulated):
    with pytest.raises(ValueError, match="found bfloat16 operands, wanted float16"):
        emulated.bank_attend(emulated.Target(70, 0, 3, 0), emulated.AttendParams())  # bfloat16 is the type of zeros


def test_compiled_module_is_of_the_present_sources():
    """A stale build would make the gate above say nothing about this tree."""
    module = check_sass.find_module()
    if module is None:
        pytest.skip("no compiled module; run `python setup.py build_ext`")
    import caco_fast._C as compiled

    sys.path.insert(0, str(ROOT / "csrc"))
    import sources

    assert compiled.source_hash == sources.content_hash(), "run `python setup.py build_ext`"


@pytest.mark.parametrize(
    "fault, arch, registers, stack, code",
    [
        ("stack 8 B", "80", 40, 8, ["HMMA.16816.F32 R0"]),
        ("1 local loads", "80", 40, 0, ["LDL R1, [R2]", "HMMA.16816.F32 R0"]),
        ("no HMMA.16816", "80", 40, 0, ["FFMA R1"]),
        ("no machine code", "80", 40, 0, []),
        ("one by one", "90", 40, 0, 2 * ["HGMMA.64x96x16.F32.BF16 R24", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]),
        ("no HGMMA", "90", 40, 0, ["HMMA.16816.F32 R0"]),
        ("1 local loads", "90", 40, 0, ["STL [R2], R1", "HGMMA.64x96x16.F32.BF16 R24"]),
        ("no setmaxnreg", "90", 168, 0, ["HGMMA.64x96x16.F32.BF16 R24"]),
        ("beyond the 160 registers", "90", 160, 0, [*SETMAXNREG, "HGMMA.64x96x16.F32.BF16 R24"]),
    ],
)
def test_static_gate_finds_a_fault(fault, arch, registers, stack, code):
    symbol = {
        "80": "_ZN4caco13attend_kernelINS_4TileINS_4sm8012InstructionsE13__nv_bfloat16Li256EEEEEvPK",
        "90": "_ZN4caco4sm9013attend_kernelINS0_4TileI13__nv_bfloat16Li256EEELb0EEEv",
    }[arch]
    kernel = check_sass.Kernel(arch, symbol, registers, stack, 0, code)
    assert any(fault in text for text in kernel.faults())


def test_static_gate_passes_a_kernel_of_sm90():
    code = [*SETMAXNREG, "HGMMA.64x96x16.F32.BF16 R24"]
    assert check_sass.Kernel("90a", "_ZN4caco4sm9013attend_kernelEv", 168, 0, 0, code).faults() == []


def build_ext(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.parametrize(
    "choice, returncode, line",
    [
        ("0", 0, "caco_fast: the CUDA backend is left out: CACO_CUDA=0"),
        ("2", 1, "error: CACO_CUDA: found '2', wanted auto, 0 or 1"),
    ],
)
def test_setup_says_in_one_line_what_it_does_not_build(choice, returncode, line):
    done = build_ext(CACO_CUDA=choice)
    assert done.returncode == returncode
    assert [text for text in done.stderr.splitlines() if "CACO_CUDA" in text] == [line]


@pytest.mark.parametrize("arches, unknown", [("80;banana", "banana"), ("80;", ""), ("sm_80", "sm_80"), ("80,20", "20")])
def test_setup_names_an_architecture_that_nvcc_does_not_know(arches, unknown):
    if check_sass.find_tool("nvcc") is None:
        pytest.skip("nvcc not found")
    done = build_ext(CACO_ARCHES=arches)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: CACO_ARCHES: found {unknown!r}, wanted some of ")
    assert done.stderr.count("\n") == 1
