"""The self-test, and the static gate of the compiled module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from caco_fast import selftest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import check_sass  # noqa: E402


def test_selftest_passes_on_emulated_kernels(cuda_ops, capsys):
    assert selftest.run(torch.device("cpu"), ((1, 1, 64), (70, 133, 80)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3 * 8 and all(line.startswith("ok") for line in lines)


@pytest.mark.parametrize("operation, output", [("attend", 2), ("attend", 0), ("select", 0)])
def test_selftest_fails_on_a_wrong_result(cuda_ops, monkeypatch, capsys, operation, output):
    right = getattr(cuda_ops, operation)

    def wrong(*arguments):
        results = list(right(*arguments))
        results[output] = results[output].roll(1, 0)
        return tuple(results)

    monkeypatch.setattr(cuda_ops, operation, wrong)
    assert not selftest.run(torch.device("cpu"), ((70, 133, 80),))
    assert "FAIL" in capsys.readouterr().out


def test_selftest_without_a_gpu_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "caco_fast.selftest"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing to test: ") and done.stderr.count("\n") == 1


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
    ],
)
def test_static_gate_finds_a_fault(fault, arch, registers, stack, code):
    symbol = f"_ZN4caco4sm{arch}13attend_kernelI13__nv_bfloat16Li256EE"
    kernel = check_sass.Kernel(arch, symbol, registers, stack, 0, code)
    assert any(fault in text for text in kernel.faults())


@pytest.mark.parametrize(
    "choice, returncode, line",
    [
        ("0", 0, "caco_fast: the CUDA backend is left out: CACO_CUDA=0"),
        ("2", 1, "error: CACO_CUDA: found '2', wanted auto, 0 or 1"),
    ],
)
def test_setup_says_in_one_line_what_it_does_not_build(choice, returncode, line):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CACO_CUDA": choice},
    )
    assert done.returncode == returncode
    assert [text for text in done.stderr.splitlines() if "CACO_CUDA" in text] == [line]
