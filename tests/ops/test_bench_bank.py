"""The benchmark of the bank operations runs, and its figures are of the work that it names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tool import load_tool

bench_bank_gpu = load_tool("bench/bank_gpu")

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "bench/bank.py", *arguments]
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


# The GPU's half, as far as it goes on the CPU


def test_gpu_sweep_writes_every_size_and_variant_with_rates_and_memory(tmp_path):
    output = tmp_path / "bench_bank_cuda.json"
    record = bench_bank_gpu.measure("cpu", ["64,512,32", "8,100,16"], ["float32"], 60, output)
    assert json.loads(output.read_text()) == record
    assert [(entry["rows"], entry["bank_rows"], entry["channels"]) for entry in record["results"]["sizes"]] == [
        (64, 512, 32),
        (8, 100, 16),
    ]
    limits = record["results"]["ceilings"]
    for entry in record["results"]["sizes"]:
        assert list(entry["variants"]) == ["dense eager", "dense eager TF32", "tiled bfloat16"]
        for result in entry["variants"].values():
            assert set(result["ms"]) == set(result["rates"]) == {"attend", "select", "step", "whole"}
            median, rate = result["ms"]["whole"]["median"], result["rates"]["whole"]
            flop = 10 * entry["rows"] * entry["bank_rows"] * entry["channels"]
            assert rate["tflop_per_s"] == pytest.approx(flop / median / 1e9, abs=0.005)
            traffic = (22 * entry["bank_rows"] + 10 * entry["rows"]) * entry["channels"] / median / 1e6
            assert rate["gb_per_s"] == pytest.approx(traffic, abs=0.06)
            assert rate["share_of_copy"] == pytest.approx(traffic / limits["copy_gb_per_s"], rel=1e-3, abs=1e-4)
        assert entry["variants"]["dense eager TF32"]["difference"] == 0
        assert 0 < entry["variants"]["tiled bfloat16"]["difference"] < 0.05
    assert len(bench_bank_gpu.table(record).splitlines()) == 4 + 6
    record["settings"]["device"] = "cuda"  # by this the tool knows which table it is
    output.write_text(json.dumps(record))
    assert run("--table", output).stdout.strip() == bench_bank_gpu.table(record)


def test_gpu_sweep_does_not_time_a_wrong_variant(monkeypatch):
    right = bench_bank_gpu.works_of

    def wrong(variant, inputs):
        works = right(variant, inputs)
        return [*works[:2], lambda: (works[2](), inputs.velocity.mul_(1.2))] if variant != "dense eager" else works

    monkeypatch.setattr(bench_bank_gpu, "works_of", wrong)
    timer = bench_bank_gpu.Timer("cpu")
    result, expected = bench_bank_gpu.run_variant("dense eager", (16, 64, 16), "cpu", timer, None)
    assert "ms" in result
    result, _ = bench_bank_gpu.run_variant("tiled float32", (16, 64, 16), "cpu", timer, expected)
    assert result == {"error": "wrong: the velocity differs by 0.2 of its norm"}


def test_gpu_sweep_keeps_going_when_a_variant_runs_out_of_memory(monkeypatch):
    def too_much(*arguments):
        raise torch.OutOfMemoryError("of memory")

    monkeypatch.setattr(bench_bank_gpu, "works_of", too_much)
    timer = bench_bank_gpu.Timer("cpu")
    result, _ = bench_bank_gpu.run_variant("dense eager", (4, 8, 16), "cpu", timer, None)
    assert result == {"error": "out of memory"}


def test_gpu_sweep_out_of_time_names_the_sizes_that_did_not_run(tmp_path):
    record = bench_bank_gpu.measure("cpu", ["4,8,16"], [], -1, tmp_path / "bench.json")
    assert record["results"]["sizes"] == [] and record["settings"]["not_run"] == [[4, 8, 16]]


def test_gpu_sweep_covers_the_sizes_asked_for():
    sizes = bench_bank_gpu.parse_sizes(None)
    assert len(sizes) == len(set(sizes)) == 5 * 3 * 2
    assert sizes[0] == (2048, 65536, 256)
    assert "dense compiled TF32" in bench_bank_gpu.variants_at(sizes[0], [])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--device", "cuda", "--sizes", "3,4"), "--sizes: found '3,4', wanted R,K,C"),
        pytest.param(
            ("--device", "cuda"),
            "--device cuda: torch finds no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_gpu_sweep_that_cannot_run_is_one_clear_line(arguments, words):
    answer = run(*arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"error: {words}") and answer.stderr.count("\n") == 1
