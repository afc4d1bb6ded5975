"""A call of tools/check/gpu.py from start to end with stand-ins for the GPU, and what a cut at any stage leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tool import load_tool

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

load_tool("check/gpu")
gpu_stages = sys.modules["gpu_stages"]

NVIDIA_SMI = """#!/bin/sh
case "$*" in
    *compute_cap*) echo 'NVIDIA Stand-In, 9.0, 580.1, 81559 MiB' ;;
    *) echo 'timestamp, clocks.sm'; exec sleep 60 ;;
esac
"""
# The stand-in of every program: it keeps what the folder holds when its stage starts, writes what the real one would
# write, and says what is expected of it. It hangs in the stage that HANG names.
PROGRAM = """#!/bin/sh
number=$(ls "$SNAPSHOTS" | wc -l)
cp -r "$OUTPUT" "$SNAPSHOTS/$number"
case "$0 $*" in *$HANG*) echo 'about to hang'; sleep 60 ;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        --output) echo '{}' > "$2"; shift ;;
        -o) echo counters > "$2"; shift ;;
    esac
    shift
done
echo '7 passed'; echo '| cuda bfloat16 1 t | 0.5 |'; echo 'ERROR SUMMARY: 0 errors'; echo 'RACECHECK SUMMARY: 0 hazards'
"""
START = """
import sys
from pathlib import Path
sys.path[:0] = [{tools!r}]
import gpu, gpu_run, gpu_stages
work = Path({folder!r}, 'work')
for module in (gpu, gpu_run, gpu_stages):
    module.WORK = work
gpu.find_tool = lambda name: str(Path({folder!r}, 'bin', name))
machine = gpu.describe_machine
gpu.describe_machine = lambda *a: __import__('dataclasses').replace(machine(*a), python=gpu.find_tool('python'))
commands = gpu_stages.commands_of_primitives
gpu_stages.commands_of_primitives = lambda *a: tuple((gpu.find_tool('primitives'), *c[1:]) for c in commands(*a))
sys.exit(gpu.main(sys.argv[1:]))
"""


class Rehearsal:
    def __init__(self, folder: Path, hang: str = "nothing hangs") -> None:
        self.output, self.snapshots = folder / "out", folder / "snapshots"
        for made in (folder / "bin", self.output, self.snapshots):
            made.mkdir()
        for name in ("nvidia-smi", "python", "primitives", "nvcc", "ncu", "compute-sanitizer"):
            program = folder / "bin" / name
            program.write_text(NVIDIA_SMI if name == "nvidia-smi" else PROGRAM)
            program.chmod(0o755)
        self.code = START.format(tools=str(ROOT / "tools" / "check"), folder=str(folder))
        names = {"OUTPUT": str(self.output), "SNAPSHOTS": str(self.snapshots), "HANG": hang}
        self.environment = {**os.environ, **names, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", self.code, *arguments, "--output", str(self.output)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, start_new_session=True, **pipes)


def stages_in(folder: Path) -> dict[str, dict]:
    found = list(folder.glob("gpu_check_*.json"))
    return json.loads(found[0].read_text())["results"]["stages"] if found else {}


def end_session(session: int) -> None:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                os.kill(int(folder.name), signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize("call, stages_of", [("quick", gpu_stages.quick), ("rest", gpu_stages.rest)])
def test_a_call_runs_to_its_end_and_at_every_stage_has_kept_those_before(tmp_path, call, stages_of):
    rehearsal = Rehearsal(tmp_path)
    process = rehearsal.start(f"--{call}")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    names = [stage.name for stage in stages_of(gpu_stages.Machine("90"))]
    found = stages_in(rehearsal.output)
    assert list(found) == names and {result["status"] for result in found.values()} == {"passed"}
    # A kill at any time would have left what was there when the stage under way began.
    kept = [list(stages_in(folder)) for folder in sorted(rehearsal.snapshots.iterdir(), key=lambda f: int(f.name))]
    assert all(names[: len(stages)] == stages for stages in kept)
    assert {len(stages) for stages in kept} == set(range(len(names)))
    for folder in rehearsal.snapshots.iterdir():
        logs = [path.read_text() for path in folder.glob("log*.txt")]
        assert all(f"=== {name}," in log for log in logs for name in stages_in(folder))
    # The device tool brings eight files back, from a machine without DALI.
    assert len([path for path in rehearsal.output.iterdir() if "bench_data" not in path.name]) <= 8
    assert "clocks.sm" in (rehearsal.output / f"clocks_{call}.csv").read_text()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_call_keeps_its_results_and_what_the_stage_under_way_had_printed(tmp_path, ending):
    rehearsal = Rehearsal(tmp_path, hang="caco_fast.selftest")
    process = rehearsal.start("--quick")
    log = rehearsal.output / "log_quick.txt"
    until = time.monotonic() + 60
    while not (log.exists() and "about to hang" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, ending)
    process.wait(timeout=30)
    if ending == signal.SIGKILL:
        end_session(process.pid)  # as the machine does with what is left
    assert list(stages_in(rehearsal.output)) == ["build", "primitives sm90"]
    assert "about to hang" in log.read_text()
