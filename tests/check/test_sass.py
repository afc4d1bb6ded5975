"""The static gate of the compiled kernels."""

import itertools
import sys
from pathlib import Path

import pytest

from tests.tool import load_tool

check_sass = load_tool("check/sass")

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
    if reason := check_sass.missing_for_sm70():
        pytest.skip(reason)
    kernels = check_sass.read_kernels_of_sm70(check_sass.packages())
    assert sum(kernel.path == "sm70" for kernel in kernels) == 3 * 4
    assert {kernel.name: kernel.faults() for kernel in kernels if kernel.faults()} == {}


@pytest.mark.parametrize(
    "fault, registers, spills, code",
    [
        ("stack 8 B", 40, 8, "mma.sync.aligned.m8n8k4.row.col"),
        ("256 registers", 256, 0, "mma.sync.aligned.m8n8k4.row.col"),
        ("no HMMA.884", 40, 0, "fma.rn.f32"),
    ],
)
def test_sm70_gate_finds_a_fault(fault, registers, spills, code):
    kernel = check_sass.Kernel(
        "70", "_ZN4caco13attend_kernelINS_4TileINS_4sm7012InstructionsELi256E", registers, spills, 0, [code]
    )
    assert len(kernel.faults()) == 1 and fault in kernel.faults()[0]


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


@pytest.mark.parametrize("register", [23, 24])
def test_static_gate_finds_a_register_that_the_copying_warps_gave_back(register):
    """Code that the other warps run may use it."""
    take, give = SETMAXNREG
    code = ["@P0 BRA 0x60 ", take, "HGMMA.64x96x16.F32.BF16 R24", "MOV R200, RZ ", "EXIT ", "NOP ", give]
    code += [f"MOV R{register}, RZ ", "EXIT "]
    symbol = "_ZN4caco4sm9011step_kernelINS0_4TileI13__nv_bfloat16Li256EEEEEvPK"
    kernel = check_sass.Kernel("90a", symbol, 168, 0, 0, code, [16 * index for index in range(len(code))])
    assert kernel.faults() == [f"the copying warps use {register + 1} registers of the 24 that they keep"] * (
        register > 23
    )


@pytest.mark.parametrize("late", [0, 2])
def test_static_gate_finds_exponentials_that_no_product_covers(late):
    """In the loop only: those before it, in its first tile, have no product to run under."""
    exponential = "MUFU.EX2 R4, R4 "
    products = [*8 * ["HGMMA.64x96x16.F32.BF16 R24"], "WARPGROUP.DEPBAR.LE gsb0, 0x1 ", *2 * [exponential]]
    loop = [*products, "WARPGROUP.DEPBAR.LE gsb0, 0x0 ", *late * [exponential], "F2FP.BF16.F32.PACK_AB R5, R4, R4 "]
    take, give = SETMAXNREG
    code = [take, "WARPGROUP.DEPBAR.LE gsb0, 0x0 ", exponential]
    code += [*loop, f"@P0 BRA {16 * len(code):#x} ", *4 * ["HGMMA.64x96x16.F32.BF16 R24"], "EXIT ", give, "EXIT "]
    addresses = [16 * index for index in range(len(code))]
    symbol = "_ZN4caco4sm9013attend_kernelINS0_4TileI13__nv_bfloat16Li256EEELb1EEEv"
    faults = check_sass.Kernel("90a", symbol, 168, 0, 0, code, addresses).faults()
    assert faults == (
        [] if late == 0 else [f"{late} exponentials after the loop's last wait for products, expected none: see `hold`"]
    )
