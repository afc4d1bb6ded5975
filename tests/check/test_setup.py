"""The build of the CUDA module by setup.py: what it says if it builds nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tool import load_tool

ROOT = Path(__file__).resolve().parents[2]


def build_ext(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.parametrize(
    "choice, returncode, line",
    [
        ("0", 0, "caco_fast: the CUDA backend is left out: CACO_CUDA=0"),
        ("2", 1, "error: CACO_CUDA: found '2', expected auto, 0 or 1"),
    ],
)
def test_setup_says_in_one_line_what_it_does_not_build(choice, returncode, line):
    done = build_ext(CACO_CUDA=choice)
    assert done.returncode == returncode
    assert [text for text in done.stderr.splitlines() if "CACO_CUDA" in text] == [line]


@pytest.mark.parametrize("arches, unknown", [("80;banana", "banana"), ("80;", ""), ("sm_80", "sm_80"), ("80,20", "20")])
def test_setup_names_an_architecture_that_nvcc_does_not_know(arches, unknown):
    if load_tool("check/sass").find_tool("nvcc") is None:
        pytest.skip("nvcc not found")
    done = build_ext(CACO_ARCHES=arches)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: CACO_ARCHES: found {unknown!r}, expected some of ")
    assert done.stderr.count("\n") == 1
