"""The self-test: it passes on right kernels, fails on wrong ones, and says so if there is nothing to test."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from caco_fast import selftest

ROOT = Path(__file__).resolve().parents[2]


def test_selftest_passes_on_emulated_kernels(cuda_ops, capsys):
    assert selftest.run(torch.device("cpu"), ((1, 1, 64), (70, 133, 80)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3 * 8 and all(line.startswith("ok") for line in lines)


@pytest.mark.parametrize("path", [80], indirect=True)
@pytest.mark.parametrize(
    "operation, output",
    [("attend_cuda", 2), ("attend_cuda", 0), ("select_cuda", 0), ("step_cuda_", 0), ("step_cuda_", 1)],
)
def test_selftest_fails_on_a_wrong_result(cuda_ops, monkeypatch, capsys, operation, output):
    module = sys.modules["caco_fast.ops.bank_" + operation.split("_")[0]]
    right = getattr(module, operation)

    def wrong(*arguments):
        results = right(*arguments)
        if results is None:
            arguments[output].copy_(arguments[output].roll(1, 0))
            return None
        return tuple(value.roll(1, 0) if at == output else value for at, value in enumerate(results))

    monkeypatch.setattr(module, operation, wrong)
    assert not selftest.run(torch.device("cpu"), ((70, 133, 80),))
    assert "FAIL" in capsys.readouterr().out


def test_selftest_without_a_gpu_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "caco_fast.selftest"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing to test: ") and done.stderr.count("\n") == 1


def test_selftest_of_no_device_names_what_it_wanted(capsys):
    with pytest.raises(SystemExit):
        selftest.main(["--device", "gpu1"])
    assert "found 'gpu1', expected a device such as cuda:1" in capsys.readouterr().err
