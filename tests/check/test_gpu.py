"""tools/check/gpu.py without a GPU: stages and their limits, the result, what --status makes of it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from caco_fast.errors import UserError
from tests.tool import load_tool

ROOT = Path(__file__).resolve().parents[2]

gpu_check = load_tool("check/gpu")

GPU = {"gpu": "NVIDIA H200", "driver": "580.1", "nvcc": "13.0", "torch": "2.11.0", "capability": "90"}
NAMES = [stage.name for stage in gpu_check.stages("90", "nvcc", "compute-sanitizer")]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")


def stage(name: str, code: str, **settings: object) -> gpu_check.Stage:
    return gpu_check.Stage(name, f"{name} holds", 20, ((sys.executable, "-c", code),), **settings)


def record(csrc_hash: str = "abc", paths: tuple[str, ...] = ("sm80",), **changed: str) -> dict:
    results = {name: {"status": changed.get(name.replace(" ", "_"), "passed")} for name in NAMES}
    settings = {**GPU, "csrc_hash": csrc_hash, "paths": list(paths)}
    return {"time": "2026-11-22T04:00:00+00:00", "settings": settings, "results": {"stages": results}}


# Stages


def test_a_failing_stage_does_not_stop_the_others(capsys):
    chosen = [stage("one", "raise SystemExit(3)"), stage("two", "print('done')")]
    results = gpu_check.run_stages(chosen, 60)
    assert results["one"]["status"].startswith("failed: python") and results["one"]["status"].endswith("status 3")
    assert results["two"]["status"] == "passed" and results["two"]["output"] == ["done"]
    assert "passed: two" in capsys.readouterr().out


def test_a_stage_that_hangs_is_ended_with_its_children_and_keeps_its_output(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; print('before', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    found = gpu_check.run_stage(stage("slow", code), 1)
    assert found["status"] == "timed out" and found["output"] == ["before"]
    time.sleep(2.5)
    assert not mark.exists()


def test_a_stage_without_time_left_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    results = gpu_check.run_stages([stage("late", f"open({str(mark)!r}, 'w')")], 1)
    assert results == {"late": {"status": "not run: no time left"}} and not mark.exists()


def test_commands_of_a_stage_share_its_limit_and_end_at_the_first_failure():
    commands = tuple((sys.executable, "-c", code) for code in ("print(1)", "raise SystemExit(1)", "print(3)"))
    found = gpu_check.run_stage(gpu_check.Stage("many", "", 9, commands), 9)
    assert found["status"].startswith("failed") and found["output"] == ["1"]


def test_the_proof_collects_only_files_that_have_tests_for_a_gpu():
    """Others may import what a bare machine lacks, and then nothing of the stage would run."""
    (tests,) = (stage for stage in gpu_check.stages("90", "", "") if stage.name == "tests")
    files = [word for word in tests.commands[0] if word.startswith("tests/")]
    assert "tests/gpu/test_device_contract.py" in files
    assert all("pytest.mark.gpu" in (ROOT / name).read_text() for name in files)


@pytest.mark.parametrize("printed, status", [("3 passed, 1 skipped", "passed"), ("3 skipped", "failed: the output")])
def test_tests_that_were_all_skipped_prove_nothing(printed, status):
    (expected,) = {stage.expected for stage in gpu_check.stages("90", "", "") if "tests" in stage.name}
    found = gpu_check.run_stage(stage("tests", f"print({printed!r})", expected=expected), 20)
    assert found["status"].startswith(status)


def test_a_program_that_is_missing_is_named():
    found = gpu_check.run_stage(gpu_check.Stage("gone", "", 9, (("no-such-program",),)), 9)
    assert found["status"] == "failed: no-such-program: No such file or directory"


def test_the_limits_of_all_stages_end_within_ten_minutes():
    assert gpu_check.TOTAL_SECONDS < 600
    assert sum(stage.limit_s for stage in gpu_check.stages("90", "", "") if stage.proof) < gpu_check.TOTAL_SECONDS


def test_every_file_that_a_stage_names_exists():
    words = [word for stage in gpu_check.stages("90", "", "") for command in stage.commands for word in command]
    named = [word for word in words if word.startswith(("tests/", "tools/")) or word.endswith(".cu")]
    assert len(named) >= 4 and all((ROOT / word).exists() for word in named)


# Status


def test_sources_that_never_ran_lack_every_proof():
    lines, proved = gpu_check.status([], "abc", ["sm80"])
    assert not proved
    assert any(line.startswith("pending: sm80") for line in lines)
    assert all(any(line.strip().startswith(f"{name}: ") for line in lines) for name in NAMES)


def test_sources_are_proved_when_every_proof_holds():
    lines, proved = gpu_check.status([record(benchmark="timed out", other_tests="failed")], "abc", ["sm80"])
    assert proved and any(line.startswith("PROVED on NVIDIA H200, driver 580.1") for line in lines)
    assert [line.split("(")[0].strip() for line in lines if "pending" in line] == [
        "pending: benchmark",
        "pending: other tests",
    ]


@pytest.mark.parametrize("lacking", ["build", "selftest", "primitives", "tests", "memcheck", "racecheck"])
def test_one_failed_proof_is_named_and_the_sources_are_not_proved(lacking):
    lines, proved = gpu_check.status([record(**{lacking: "timed out"})], "abc", ["sm80"])
    assert not proved
    assert any(line.startswith(f"  pending: {lacking} (timed out)") for line in lines)


def test_a_proof_of_other_sources_proves_nothing():
    lines, proved = gpu_check.status([record(csrc_hash="old")], "abc", ["sm80"])
    assert not proved and any(line.startswith("of other sources (old)") for line in lines)


def test_every_path_needs_a_proof():
    lines, proved = gpu_check.status([record(paths=("sm80", "sm90"))], "abc", ["sm70", "sm80", "sm90"])
    assert not proved
    assert [line for line in lines if line.startswith("pending")] == [
        "pending: sm70: has run under emulation only, or not all of its proofs hold on a GPU"
    ]
    assert gpu_check.status([record(), record(paths=("sm90",))], "abc", ["sm80", "sm90"])[1]


@pytest.mark.parametrize("capability, paths", [("90", ["sm80", "sm90"]), ("86", ["sm80"]), ("75", ["sm70"])])
def test_a_gpu_runs_the_paths_of_its_class(capability, paths):
    assert gpu_check.paths_run(capability, ["sm70", "sm80", "sm90"]) == paths


def test_a_broken_result_is_one_clear_line(tmp_path):
    (tmp_path / "gpu_check_x.json").write_text("{}")
    with pytest.raises(UserError, match="gpu_check_x.json: not a result of tools/check/gpu.py"):
        gpu_check.read_results(tmp_path)


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "tools/check/gpu.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no CUDA GPU") and done.stderr.count("\n") == 1


def test_the_result_names_gpu_sources_and_stages_and_a_second_run_adds_to_it(monkeypatch, tmp_path, capsys):
    output = tmp_path / "gpu_check_nvidia_h200.json"
    measured = gpu_check.WORK / "bench_ops_cuda.json"
    measure = f"open({str(measured)!r}, 'w').write('{{}}')"
    fake = [stage("build", measure), stage("tests", "raise SystemExit(1)")]
    monkeypatch.setattr(gpu_check, "describe_gpu", lambda: {**GPU, "nvcc_path": "nvcc"})
    monkeypatch.setattr(gpu_check, "stages", lambda *arguments: fake)
    monkeypatch.setattr(gpu_check, "kernel_paths", lambda: ["sm70", "sm80"])
    assert gpu_check.main(["--output", str(output), "--commit", "f00"]) == 1
    assert json.loads(output.read_text())["results"]["benchmarks"] == ["bench_ops_nvidia_h200.json"]
    assert (tmp_path / "bench_ops_nvidia_h200.json").read_text() == "{}"
    fake[1] = stage("tests", "print('now')")
    assert gpu_check.main(["--output", str(output), "--only", "tests"]) == 0
    found = json.loads(output.read_text())
    assert found["settings"].items() >= {**GPU, "csrc_hash": gpu_check.sources.content_hash()}.items()
    assert found["settings"]["paths"] == ["sm80"]
    assert {name: result["status"] for name, result in found["results"]["stages"].items()} == {
        "build": "passed",
        "tests": "passed",
    }
    assert {"machine", "versions", "commit", "content_sha256", "time"} <= set(found)
    assert gpu_check.read_results(tmp_path) == [found]
    with pytest.raises(UserError, match="--only: found 'x', expected one of: build, tests"):
        gpu_check.main(["--output", str(output), "--only", "x"])
