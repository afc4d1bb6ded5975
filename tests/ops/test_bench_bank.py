"""The benchmark of the bank operations runs, and its figures are of the work that it names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "bench_bank.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_writes_times_and_memory_of_every_variant(tmp_path):
    output = tmp_path / "bench.json"
    rows, bank_rows = 256, 16384
    sizes = ("--rows", rows, "--bank-rows", bank_rows, "--channels", 32, "--repeats", 2, "--threads", 1)
    answer = run(*sizes, "--output", output)
    assert answer.returncode == 0, answer.stderr
    record = json.loads(output.read_text())
    assert list(record["results"]) == ["dense eager", "tiled float32", "tiled bfloat16"]
    for result in record["results"].values():
        assert set(result["ms"]) == {"attend", "select", "step", "whole", "processor"}
        assert all(0 < part["p20"] <= part["median"] <= part["p80"] for part in result["ms"].values())
    # The dense step holds the similarities and their softmax at the same time; the tiled one neither, and at this size
    # its extra memory is mostly what the allocator keeps.
    extra = {variant: result["extra_bytes"] for variant, result in record["results"].items()}
    assert extra["dense eager"] > 2 * 4 * rows * bank_rows
    assert 0 < extra["tiled float32"] < extra["dense eager"] / 2
    assert {"machine", "versions", "commit", "dirty", "content_sha256", "settings", "time"} <= set(record)
    table = run("--table", output)
    assert "| tiled bfloat16 |" in table.stdout


def test_a_missing_result_is_one_clear_line(tmp_path):
    answer = run("--table", tmp_path / "none.json")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: --table") and "no such file" in answer.stderr
    assert "Traceback" not in answer.stderr
