"""The distributions as a user gets them: an sdist that builds, and a wheel that can train in any folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# The build backend's own entry points, as `python -m build` and pip call them.
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""


def build(hook: str, source: Path, output: Path) -> None:
    """Build in `source` without fetching anything and without nvcc."""
    output.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(output)],
        capture_output=True,
        text=True,
        cwd=source,
        env={**os.environ, "CACO_CUDA": "0"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution of this checkout, in a folder whose path has a blank."""
    top = tmp_path_factory.mktemp("a folder")
    checkout = top / "checkout"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, checkout, ignore=left_out)
    build("build_sdist", checkout, top / "dist")
    with tarfile.open(next((top / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(top, filter="data")
    return next(path for path in top.glob("caco_fast-*") if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The unpacked wheel, built from the source distribution."""
    build("build_wheel", sdist, sdist.parent / "wheel")
    folder = sdist.parent / "installed"
    with zipfile.ZipFile(next((sdist.parent / "wheel").glob("*.whl"))) as archive:
        archive.extractall(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_sdist_holds_every_file_that_is_needed_to_build_and_test(sdist: Path) -> None:
    held = files(sdist)
    kinds = ("csrc", "caco_fast", "tests", "tools", "docs", "benchmarks")
    passed_over = {"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for kind in kinds
        for path in (ROOT / kind).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc") and not passed_over & set(path.parts)
    }
    assert wanted - held == set()
    assert {"LICENSE", "NOTICE", "README.md", "setup.py", "pyproject.toml", "CMakeLists.txt"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_a_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    held = files(wheel)
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "caco_fast").rglob("*.py")}
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "caco_fast" / "configs").rglob("*.yaml")}
    data |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "caco_fast").rglob("embedded/*")}
    data.add("caco_fast/report/page.html")
    assert any(name.endswith(".npz") for name in data) and len(data) > 8
    assert {name for name in held if not name.startswith("caco_fast-")} == package | data
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in held}


def test_the_command_of_a_wheel_runs_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    entry = next(wheel.glob("*.dist-info")) / "entry_points.txt"
    name, _, target = entry.read_text().split("[console_scripts]")[1].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "caco-fast"

    def run(*arguments: str) -> str:
        script = f"import sys, {module}; sys.argv = [{name!r}, *sys.argv[1:]]; {module}.{function}()"
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(wheel)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--help").startswith("usage: caco-fast ")
    assert "quickstart " in run("train", "--list-configs")
    shown = run("train", "--config", "imagenet_resnet50_200ep_batch1024", "--print-config", "data.path=/data/imagenet")
    assert "  batch_size: 1024 " in shown
