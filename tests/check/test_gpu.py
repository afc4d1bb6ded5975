"""tools/check/gpu.py without a GPU: stages and their limits, the result, what --status makes of it."""

import json
import os
import re
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
gpu_run, gpu_stages, gpu_status = (sys.modules[name] for name in ("gpu_run", "gpu_stages", "gpu_status"))

PARTS = ("bank_attend", "bank_select", "bank_step")
GPU = {"gpu": "NVIDIA H200", "driver": "580.1", "nvcc": "13.0", "torch": "2.11.0", "capability": "90"}
HOPPER = gpu_stages.Machine("90")
STAGES = {stage.name: stage for stage in gpu_stages.stages(HOPPER)}
PROOFS_OF_SM90 = ["build", "primitives sm90", "selftest", "tests sm90", "memcheck", "tests compile", "racecheck"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (gpu_check, gpu_run, gpu_stages):
        monkeypatch.setattr(module, "WORK", tmp_path / "work")


def stage(name: str, code: str, **settings: object) -> gpu_stages.Stage:
    return gpu_stages.Stage(name, f"{name} holds", 20, ((sys.executable, "-c", code),), **settings)


def run(folder: Path, *stages: gpu_stages.Stage, seconds: float = 60, **settings: object) -> dict:
    return gpu_run.Runner(folder, seconds).run(list(stages), lambda found: None, **settings)


def record(csrc_hash: str = "abc", capability: str = "90", day: int = 22, **changed: str) -> dict:
    names = [stage.name for stage in gpu_stages.stages(gpu_stages.Machine(capability))]
    results = {name: {"status": changed.get(name.replace(" ", "_"), "passed")} for name in names}
    settings = {**GPU, "capability": capability, "csrc_hash": csrc_hash}
    return {"time": f"2026-11-{day}T04:00:00+00:00", "settings": settings, "results": {"stages": results}}


# Running


def test_a_failing_stage_does_not_stop_the_others(tmp_path, capsys):
    results = run(tmp_path, stage("one", "raise SystemExit(3)"), stage("two", "print('done')"))
    assert results["one"]["status"].startswith("failed: python") and results["one"]["status"].endswith("status 3")
    assert results["two"]["status"] == "passed" and results["two"]["output"] == ["done"]
    assert "passed: two" in capsys.readouterr().out


def test_a_stage_that_hangs_is_ended_with_its_children_and_keeps_its_output(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; print('before', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    found = run(tmp_path, gpu_stages.Stage("slow", "", 1, ((sys.executable, "-c", code),)))["slow"]
    assert found["status"] == "timed out" and found["output"] == ["before"]
    time.sleep(2.5)
    assert not mark.exists()


def test_a_stage_without_time_left_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    results = run(tmp_path, stage("late", f"open({str(mark)!r}, 'w')"), seconds=1)
    assert results == {"late": {"status": "not run: no time left"}} and not mark.exists()


def test_out_of_time_is_no_failure_and_a_hang_is_looked_into_once(tmp_path):
    slow = "import time; time.sleep(30)"
    stages = [gpu_stages.Stage(name, "", 1, ((sys.executable, "-c", slow),), waits=True) for name in "ab"]
    found = run(tmp_path, *stages, follow_up=stage("where", "print('waited too long: block 3 0')", shown="waited"))
    assert list(found) == ["a", "where", "b"]
    assert found["where"]["output"] == ["waited too long: block 3 0"]
    assert gpu_run.counts(found) == {"passed": 1, "failed": 0, "timed out": 2, "not run": 0}


def test_commands_of_a_stage_share_its_limit_and_end_at_the_first_failure(tmp_path):
    commands = tuple((sys.executable, "-c", code) for code in ("print(1)", "raise SystemExit(1)", "print(3)"))
    found = run(tmp_path, gpu_stages.Stage("many", "", 9, commands))["many"]
    assert found["status"].startswith("failed") and found["output"] == ["1"]


def test_what_a_stage_needs_beforehand_runs_beside_the_stages_before_it(tmp_path):
    there = tmp_path / "there"
    made = (sys.executable, "-c", f"print('made'); open({str(there)!r}, 'w')")
    wait = f"import os, time\nwhile not os.path.exists({str(there)!r}): time.sleep(0.01)"
    later = gpu_stages.Stage("later", "", 9, (("echo", "used"),), beforehand=(made,), shown=".")
    found = run(tmp_path, stage("first", wait), later)
    assert found["first"]["status"] == "passed" and found["later"]["output"] == ["made", "used"]
    failing = gpu_stages.Stage("later", "", 9, (("echo", "used"),), beforehand=(("false",),))
    assert run(tmp_path, failing)["later"]["status"] == "failed: false ended with status 1"


@pytest.mark.parametrize("printed, status", [("3 passed, 1 skipped", "passed"), ("3 skipped", "failed: the output")])
def test_tests_that_were_all_skipped_prove_nothing(tmp_path, printed, status):
    (expected,) = {stage.expected for stage in STAGES.values() if "tests" in stage.name}
    assert run(tmp_path, stage("tests", f"print({printed!r})", expected=expected))["tests"]["status"].startswith(status)


def test_figures_of_wrong_kernels_are_a_failure():
    expected = STAGES["headline"].expected
    assert re.search(expected, "| cuda bfloat16 1 t | 0.2 | 0.1 |")
    assert not re.search(expected, "| cuda bfloat16 1 t |  |  | wrong: its result differs by 0.5 |")


def test_a_program_that_is_missing_is_named(tmp_path):
    found = run(tmp_path, gpu_stages.Stage("gone", "", 9, (("no-such-program",),)))
    assert found["gone"]["status"] == "failed: no-such-program: No such file or directory"


def test_what_cannot_run_is_left_out_with_its_reason(tmp_path):
    stages = [
        stage("build", "raise SystemExit(1)"),
        stage("selftest", ""),
        stage("steps", "", needs=(), packages=("nowhere",)),
    ]
    found = run(tmp_path, *stages)
    assert found["selftest"]["status"] == "not run: build has not passed"
    assert found["steps"]["status"].startswith("not run: the package nowhere is missing; bring it: python tools/check/")


# The stages


def test_the_calls_fit_the_time_that_a_gpu_is_lent_for():
    assert gpu_stages.QUICK_SECONDS <= 240 and gpu_stages.REST_SECONDS <= 400 and gpu_stages.ALL_SECONDS < 600
    assert all(stage.limit_s <= 120 for stage in STAGES.values())


def test_the_most_important_comes_first():
    names = [stage.name for stage in gpu_stages.quick(HOPPER)]
    assert names == ["build", "primitives sm90", "selftest", "headline", "profile", "tests sm90", "sizes"]
    names = [stage.name for stage in gpu_stages.rest(HOPPER)]
    assert names[:2] == ["build", "memcheck"] and names[-1] == "racecheck"
    assert [name for name, stage in STAGES.items() if "sm90" in stage.paths] == PROOFS_OF_SM90


@pytest.mark.parametrize("capability, target", [("90", "90a"), ("80", "80"), ("75", "75")])
def test_the_build_is_for_this_gpu_only(capability, target):
    build = gpu_stages.build(gpu_stages.Machine(capability))
    assert build.environment == {"CACO_ARCHES": target, "CACO_CUDA": "1"}


def test_the_proof_collects_only_files_that_have_tests_for_a_gpu():
    """Others may import what a bare machine lacks, and then nothing of the stage would run."""
    files = [word for word in STAGES["tests sm90"].commands[0] if word.startswith("tests/")]
    assert {"tests/gpu/test_device_contract.py", *(f"tests/ops/test_{part}.py" for part in PARTS)} <= set(files)
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    ).stdout
    assert all(f"{name}::" in listed for name in files)


def test_every_file_that_a_stage_names_exists():
    commands = [command for stage in STAGES.values() for command in (*stage.beforehand, *stage.commands)]
    words = [word for command in commands for word in command]
    named = [word for word in words if word.startswith(("tests/", "tools/", "caco_fast/")) or word.endswith(".cu")]
    assert len(named) >= 8 and all((ROOT / word).exists() for word in named)


@pytest.mark.parametrize("call", [gpu_stages.quick, gpu_stages.rest])
def test_a_call_brings_back_no_more_files_than_the_device_tool_takes(call):
    """Eight at most: besides these there are the result, the log and the clocks."""
    machine = gpu_stages.Machine("90", output=Path("/folder"))
    words = " ".join(word for stage in call(machine) if stage.name != "DALI" for c in stage.commands for word in c)
    files = set(re.findall(r"/folder/[\w.]+", words)) - {"/folder/kernels_gpu"}
    assert len(files) + 3 <= 8


@pytest.mark.parametrize("capability, paths", [("90", ["sm80", "sm90"]), ("86", ["sm80"]), ("75", ["sm70"])])
def test_a_gpu_runs_the_paths_of_its_class(capability, paths):
    assert gpu_stages.paths_run(capability, ["sm70", "sm80", "sm90"]) == paths


# Status


def test_sources_that_never_ran_lack_every_proof():
    lines, proved = gpu_status.status([], "abc", ["sm80", "sm90"])
    assert not proved and "sm90: pending: has run under emulation only" in lines
    assert all(any(line.strip().startswith(f"pending: {name}: ") for line in lines) for name in PROOFS_OF_SM90)


def test_sources_are_proved_when_every_proof_holds():
    lines, proved = gpu_status.status([record(sizes="timed out", other_tests="failed")], "abc", ["sm80", "sm90"])
    assert proved and "sm90: PROVED on NVIDIA H200, driver 580.1, nvcc 13.0, 2026-11-22" in lines
    assert [line.partition(" (")[0] for line in lines[3:]] == [
        "not measured on NVIDIA H200: sizes",
        "not measured on NVIDIA H200: other tests",
    ]


@pytest.mark.parametrize("lacking", PROOFS_OF_SM90)
def test_one_failed_proof_is_named_and_the_path_is_not_proved(lacking):
    lines, proved = gpu_status.status([record(**{lacking.replace(" ", "_"): "timed out"})], "abc", ["sm80", "sm90"])
    assert not proved
    assert "sm90: proved in part on NVIDIA H200, driver 580.1, nvcc 13.0, 2026-11-22" in lines
    assert any(line.startswith(f"  pending: {lacking} (timed out): ") for line in lines)
    assert any(line.startswith("sm80: PROVED") for line in lines) == (lacking != "build")


def test_partial_proofs_of_the_same_sources_add_up():
    """What passed stays proved if a later call had no time for it, but not if it then failed."""
    first, second = record(racecheck="timed out"), record(selftest="not run", day=23)
    assert gpu_status.status([first, second], "abc", ["sm90"])[1]
    assert not gpu_status.status([first, second, record(selftest="failed: 1", day=24)], "abc", ["sm90"])[1]
    assert not gpu_status.status([first, record("other")], "abc", ["sm90"])[1]


def test_a_proof_of_other_sources_proves_nothing():
    lines, proved = gpu_status.status([record(csrc_hash="old")], "abc", ["sm80"])
    assert not proved and any(line.startswith("of other sources (old)") for line in lines)


def test_every_path_needs_a_proof():
    lines, proved = gpu_status.status([record()], "abc", ["sm70", "sm80", "sm90"])
    assert not proved and "sm70: pending: has run under emulation only" in lines
    older = record(capability="75")
    older["settings"]["gpu"] = "T4"
    assert gpu_status.status([record(), older], "abc", ["sm70", "sm80", "sm90"])[1]


def test_the_readme_says_it_by_path():
    found = gpu_status.short(record(tests_sm80="timed out", memcheck="failed: status 9"))
    assert found.startswith(
        "`csrc/` with the content hash abc on NVIDIA H200: sm90 lacks memcheck (failed); sm80 lacks"
    )
    assert found.endswith("tests sm80 (timed out).")


def test_a_broken_result_is_one_clear_line(tmp_path):
    (tmp_path / "gpu_check_x.json").write_text("{}")
    with pytest.raises(UserError, match="gpu_check_x.json: not a result of tools/check/gpu.py"):
        gpu_status.read_results(tmp_path)


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "tools/check/gpu.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no CUDA GPU") and done.stderr.count("\n") == 1


def test_the_result_names_gpu_sources_and_stages_and_a_second_run_adds_to_it(monkeypatch, tmp_path):
    output = tmp_path / "out"
    fake = [stage("build", ""), stage("tests", "raise SystemExit(1)")]
    monkeypatch.setattr(gpu_check, "describe_gpu", lambda: GPU)
    monkeypatch.setitem(gpu_check.CALLS, "", (lambda machine: fake, 60))
    assert gpu_check.main(["--output", str(output), "--commit", "f00"]) == 1
    fake[1] = stage("tests", "print('now')")
    assert gpu_check.main(["--output", str(output), "--only", "tests"]) == 0
    found = json.loads((output / "gpu_check_nvidia_h200.json").read_text())
    assert found["settings"].items() >= {**GPU, "csrc_hash": gpu_check.sources.content_hash()}.items()
    assert found["settings"]["paths"] == ["sm80", "sm90"]
    assert {name: result["status"] for name, result in found["results"]["stages"].items()} == {
        "build": "passed",
        "tests": "passed",
    }
    assert {"machine", "versions", "commit", "content_sha256", "time"} <= set(found)
    assert gpu_status.read_results(output) == [found]
    with pytest.raises(UserError, match="--only: found 'x', expected one of: build, tests"):
        gpu_check.main(["--output", str(output), "--only", "x"])
    fake[1] = gpu_stages.Stage("tests", "", 1, (("sleep", "9"),))
    assert gpu_check.main(["--output", str(output), "--only", "tests"]) == 3
