"""The cores that a process may use, by its affinity, its container and its ranks."""

import os
from pathlib import Path

import pytest

from caco_fast import host, provenance
from caco_fast.data import DataConfig


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores, of which this process may use 8, outside of containers and of torchrun."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(host, "CPU_QUOTAS", ())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize("ranks, share", [("1", 8), ("3", 2), ("64", 1), ("", 8)])
def test_the_ranks_of_a_machine_share_the_cores_of_its_affinity(monkeypatch, ranks: str, share: int) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert host.cores() == 8 and host.cores_of_rank() == share
    assert DataConfig().worker_processes() == share


def test_all_cores_count_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert host.cores() == 64 and DataConfig().worker_processes() == 12
    assert provenance.hardware()["cpu_cores"] == 64


@pytest.mark.parametrize(
    "texts, found",
    [
        (["300000 100000"], 3),
        (["50000 100000"], 1),
        (["max 100000"], 8),
        (["6400000 100000"], 8),
        (["250000", "100000"], 2),
        (["-1", "100000"], 8),
        ([], 8),
    ],
)
def test_the_quota_of_a_container_limits_the_cores(tmp_path: Path, monkeypatch, texts: list[str], found: int) -> None:
    files = [tmp_path / str(number) for number in range(len(texts))]
    for file, text in zip(files, texts):
        file.write_text(text + "\n")
    monkeypatch.setattr(host, "CPU_QUOTAS", (tuple(map(str, files or [tmp_path / "absent"])),))
    assert host.cores() == found
