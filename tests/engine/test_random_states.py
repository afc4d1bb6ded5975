"""Random number generators continue after a restore as if they had never been interrupted."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from caco_fast.engine.checkpoint import CheckpointStore, capture_random_states, restore_random_states


def draws() -> tuple:
    # Odd counts of normals: Python and numpy keep the second of a pair for the next call.
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_all_generators_continue_through_a_checkpoint(tmp_path: Path) -> None:
    draws()
    store = CheckpointStore(tmp_path)
    path = store.save({"random": capture_random_states()}, 1)
    expected = [draws(), draws()]
    draws()
    restore_random_states(store.load(path)["random"])
    assert [draws(), draws()] == expected


def test_other_number_of_ranks_warns_and_restores_nothing(caplog: pytest.LogCaptureFixture) -> None:
    states = capture_random_states() * 3
    torch.rand(1)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        restore_random_states(states)
    assert "saved by 3 ranks, found 1" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_cuda_generator_continues() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.rand(1, device="cuda")
    state = capture_random_states()
    expected = torch.rand(5, device="cuda")
    restore_random_states(state)
    assert torch.equal(torch.rand(5, device="cuda"), expected)
