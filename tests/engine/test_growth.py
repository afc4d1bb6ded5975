"""Nothing grows in a long run: open files, threads and memory are the same after its first part and at its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# CACO_GROWTH_STEPS=2000 is the full test, some minutes for each loader.
STEPS = int(os.environ.get("CACO_GROWTH_STEPS", "150"))
# Room for the allocator. Seen: 0.4 over the last 1,900 of 2,000 steps of the memory loader, 2.5 over the first 100.
MEBIBYTES = 8.0


@pytest.mark.parametrize("loader", ["torchvision", "memory"])
def test_a_long_run_grows_in_nothing(tmp_path, loader):
    script = [sys.executable, str(Path(__file__).with_name("growth.py")), str(tmp_path / "run")]
    done = subprocess.run([*script, "--steps", str(STEPS), "--loader", loader], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    samples = json.loads(done.stdout.splitlines()[-1])["samples"]
    assert len(samples) == STEPS // 10
    # After the first evaluation and checkpoints, whose files and threads stay.
    later = samples[len(samples) // 3 :]
    assert len({(files, threads) for _, _, _, files, threads in later}) == 1, later
    assert max(own for _, own, *_ in later) - later[0][1] < MEBIBYTES, later
