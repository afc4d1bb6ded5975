"""Generators go on after a restore as if nothing had come between."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from caco_fast.engine import random_state
from caco_fast.engine.checkpoint import CheckpointStore


def draws() -> tuple:
    # Odd counts of normals: Python and numpy keep the second of a pair for the next call.
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_all_generators_go_on_through_a_checkpoint(tmp_path: Path) -> None:
    draws()
    store = CheckpointStore(tmp_path)
    path = store.save({"random": random_state.capture()}, 1)
    expected = [draws(), draws()]
    draws()
    random_state.restore(store.load(path)["random"])
    assert [draws(), draws()] == expected


def test_ranks_of_one_process() -> None:
    states = random_state.capture_ranks()
    expected = draws()
    random_state.restore_ranks(states)
    assert draws() == expected


def test_other_number_of_ranks_warns_and_restores_nothing(caplog: pytest.LogCaptureFixture) -> None:
    states = random_state.capture_ranks() * 3
    torch.rand(1)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        random_state.restore_ranks(states)
    assert "saved by 3 ranks, found 1" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_cuda_generator_goes_on() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.rand(1, device="cuda")
    state = random_state.capture()
    expected = torch.rand(5, device="cuda")
    random_state.restore(state)
    assert torch.equal(torch.rand(5, device="cuda"), expected)
