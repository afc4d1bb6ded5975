"""The programs that compare each primitive on the device with its emulation."""

import subprocess
import sys

import pytest
import torch

from tests.emulation import build
from tests.tool import load_tool

load_tool("check/gpu")
gpu_stages, find_tool = sys.modules["gpu_stages"], sys.modules["sass"].find_tool

PATHS = gpu_stages.kernel_paths()


def test_every_path_has_a_program_of_its_primitives():
    assert PATHS
    for path in PATHS:
        assert (build.HERE / f"primitives_check_{path}.cu").exists()


@pytest.mark.parametrize("path", PATHS)
def test_the_program_of_primitives_compares_every_primitive(path, tmp_path):
    if reason := build.missing_tool():
        pytest.skip(reason)
    program = build.build_program(f"primitives_check_{path}.cu")
    results = tmp_path / "results"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)

    written = run(results)
    assert written.returncode == 0
    same = run(results, "compare")
    assert same.returncode == 0
    lines = same.stdout.splitlines()
    assert f"{len(lines)} checks written" in written.stdout and all(line.startswith("ok") for line in lines)
    # One flipped bit in the middle of every check's values is found in just that check.
    data, at = bytearray(results.read_bytes()), 0
    while at < len(data):
        count = int.from_bytes(data[at : at + 8], "little")
        data[at + 8 + 4 * (count // 2) + 3] ^= 0x40
        at += 8 + 4 * count
    results.write_bytes(data)
    changed = run(results, "compare")
    assert changed.returncode == 1
    assert [line[:4] for line in changed.stdout.splitlines()] == ["FAIL"] * len(lines)
    results.write_bytes(data[:100])
    assert run(results, "compare").returncode == 2


@pytest.mark.parametrize("path", PATHS)
def test_the_program_of_primitives_compiles_for_the_device(path, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_stages, "WORK", tmp_path / "work")
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found")
    (tmp_path / "work").mkdir()
    # CUDA 13 has no sm_70; later GPUs have its instructions.
    _, compile_device, _, run_device = gpu_stages.commands_of_primitives(path, "90" if path != "sm80" else "80", nvcc)
    done = subprocess.run(compile_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        answer = subprocess.run(run_device, capture_output=True, text=True)
        assert answer.returncode == 2 and answer.stdout.startswith("error: CUDA driver")
