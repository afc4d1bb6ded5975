"""What the ranks send for the bank in a step of CaCo: as many bytes as its formula says, whatever K is.

Legend: B images of the global batch, R = 2 B query rows, K bank rows, C channels, N ranks.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tool import load_tool

bench_collectives = load_tool("bench/collectives")

ROOT = Path(__file__).resolve().parents[2]

B, C, RANKS = 12, 8, 3


def payload(parallel: str, rows: int, channels: int, operand_bytes: int) -> int:
    """Bytes, for M = 1."""
    # Index of the positive for the step or its metric, weight of the positive, weight of the row.
    queries, index, weights = rows * channels * operand_bytes, rows * 8, rows * 4 + rows * 4
    if parallel == "replicated":
        return queries + index + weights + rows * 4 + index  # and the lse
    keys, packed, normalisers = rows * channels * 4, rows * 8, 2 * rows * 4
    return keys + packed + queries + index + weights + 2 * normalisers + rows * (channels + 1) * 4 + index


def on_rank() -> list[dict[str, Any]]:
    return [
        {"parallel": parallel, "size": size, "operands": 2 if dtype == torch.bfloat16 else 4}
        | bench_collectives.measure_step(parallel, B, size, C, dtype)
        for parallel in ("sharded", "replicated")
        for size in (31, 310)
        for dtype in (torch.float32, torch.bfloat16)
    ]


@pytest.fixture(scope="module")
def measured() -> list[list[dict[str, Any]]]:
    return run_ranks(on_rank, RANKS)


def test_bytes_are_those_of_the_formula_and_independent_of_k(measured: list[list[dict[str, Any]]]) -> None:
    for found in measured:
        for case in found:
            assert case["payload_bytes"] == payload(case["parallel"], 2 * B, C, case["operands"]), case


def test_a_rank_holds_its_share_of_bank_and_velocity(measured: list[list[dict[str, Any]]]) -> None:
    for case in zip(*measured):
        rows = [each["held_bytes"] // (2 * 4 * C) for each in case]
        size = case[0]["size"]
        if case[0]["parallel"] == "replicated":
            assert rows == [size] * RANKS
        else:
            assert sum(rows) == size and max(rows) - min(rows) <= 1


def test_at_the_published_batch_it_is_the_six_megabytes_of_the_design() -> None:
    """The recorded measurement: batch 1024, 8 ranks, C 256."""
    record = json.loads((ROOT / "benchmarks" / "results" / "bench_collectives.json").read_text())
    settings, sharded = record["settings"], [each for each in record["results"] if each["parallel"] == "sharded"]
    assert (settings["batch"], settings["ranks"], settings["channels"]) == (1024, 8, 256)
    assert {each["bank_rows"] for each in sharded} == {65536, 2**20}
    for each in sharded:
        operand_bytes = 2 if each["operands"] == "bfloat16" else 4
        assert each["payload_bytes"] == payload("sharded", 2048, 256, operand_bytes) < 6.5e6
    assert bench_collectives.table(record).count("| sharded |") == len(sharded)
