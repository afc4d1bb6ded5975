"""The build of the CUDA module by setup.py: what it says if it builds nothing, and paths that have blanks."""

import os
import shutil
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


# It writes the object or module that it is asked for, and the list of headers that ninja reads.
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.0" ;;
--list-gpu-arch) {arches} ;;
*)
    {compile}
    while [ $# -gt 0 ]; do
        case "$1" in -o) echo module > "$2" ;; -MF) : > "$2" ;; esac
        shift
    done ;;
esac
"""


def cuda_home(
    folder: Path, arches: str = "echo compute_80 compute_90", release: str = "13.0", compile: str = ""
) -> Path:
    """A folder with an nvcc that compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(arches=arches, release=release, compile=compile))
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The parts of this repository that the build reads, in a folder whose name the shell and ninja would split."""
    copy = tmp_path / "my $HOME src"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "caco_fast").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "caco_fast/__init__.py"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build_in(checkout: Path, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_HOME": str(home), "CXX": str(home / "bin" / "nvcc"), **environment}
    environment["CXX"] = f"'{environment['CXX']}'"
    command = [sys.executable, "setup.py", "build_ext"]
    return subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)


def test_checkout_and_cuda_may_have_blanks_in_their_paths(checkout, tmp_path):
    done = build_in(checkout, cuda_home(tmp_path / "CUDA 13 toolkit"), CACO_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((checkout / "caco_fast").glob("_C*.so"))) == 1


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"arches": "echo broken >&2; exit 1"}, "does not work: broken"),
        ({"arches": "echo compute_50 compute_60"}, "knows none of the architectures"),
        ({"release": "11.8"}, "is of CUDA 11.8, expected 12 or later"),
        ({"release": ""}, "does not work"),
    ],
)
def test_an_nvcc_that_can_not_build_is_left_out_by_auto_and_an_error_by_1(checkout, tmp_path, options, reason):
    home = cuda_home(tmp_path / "cuda", **options)
    for choice, returncode in (("auto", 0), ("1", 1)):
        done = build_in(checkout, home, CACO_CUDA=choice)
        (line,) = [text for text in done.stderr.splitlines() if "nvcc" in text]
        assert done.returncode == returncode and reason in line, done.stderr
        assert line.startswith("error: CACO_CUDA=1" if returncode else "caco_fast: the CUDA backend is left out: ")


def test_a_failed_compilation_names_the_way_without_it(checkout, tmp_path):
    done = build_in(checkout, cuda_home(tmp_path / "cuda", compile="exit 1"))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("CACO_CUDA=0 leaves it out"), done.stderr
