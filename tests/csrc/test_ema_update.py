"""ema_update_ on emulated kernels, against the formula in f64."""

import pytest
import torch

from caco_fast.ops import ema_update_
from tests.csrc.tensor_lists import copies, flag, make, same

# The kernels are the same on every path.
pytestmark = pytest.mark.parametrize("path", [80], indirect=True)


def lists(device: torch.device, misaligned: bool = False):
    generator = torch.Generator().manual_seed(0)
    return make(generator, device, misaligned), make(generator, device)


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("weight", [0.01, 0.75])
def test_ema_follows_the_formula(cuda_ops, device, weight, misaligned):
    averages, values = lists(device, misaligned)
    wanted = [g.double() + weight * (f.double() - g.double()) for g, f in zip(averages, values)]
    kept = copies(values)
    ema_update_(averages, values, weight, backend="cuda")
    for found, exact in zip(averages, wanted):
        # Two roundings of numbers up to 6, and one of the result.
        torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=6e-7)
    assert same(values, kept)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ema_is_exact_at_its_ends(cuda_ops, device, weight):
    averages, values = lists(device)
    wanted = copies(values if weight else averages)
    ema_update_(averages, values, weight, backend="cuda")
    assert same(averages, wanted)


@pytest.mark.parametrize("set_to", [0.0, 1.0])
def test_ema_is_skipped_where_the_flag_is_set(cuda_ops, device, set_to):
    averages, values = lists(device)
    before, unflagged = copies(averages), copies(averages)
    ema_update_(unflagged, values, 0.25, backend="cuda")
    ema_update_(averages, values, 0.25, skip=flag(set_to, device), backend="cuda")
    assert same(averages, before if set_to else unflagged) and not same(before, unflagged)


def test_ema_is_of_the_tensors_as_they_now_stand(cuda_ops, device):
    """A list that the table was written of before, with one value in other memory and one that has changed in place."""
    averages, values = lists(device)
    ema_update_(averages, values, 0.5, backend="cuda")
    values[0], values[3] = values[0] + 1, values[3]
    values[1].mul_(2)
    wanted = copies(averages)
    ema_update_(wanted, values, 0.5, backend="reference")
    ema_update_(averages, values, 0.5, backend="cuda")
    for found, expected in zip(averages, wanted):
        torch.testing.assert_close(found, expected)


def test_ema_of_more_tensors_than_one_launch_describes(cuda_ops, device):
    averages = [torch.full((at % 5,), float(at), device=device) for at in range(200)]
    values = [average + 1 for average in averages]
    ema_update_(averages, values, 0.5, backend="cuda")
    assert same(averages, [value - 0.5 for value in values])


@pytest.mark.parametrize("schedule", [dict(seed=1), dict(seed=5, greedy=True)], ids=["reversed", "greedy"])
def test_ema_under_every_schedule_gives_the_same_bits(cuda_ops, device, emulated, schedule):
    results = []
    for settings in ({}, schedule):
        averages, values = lists(device)
        emulated.set_schedule(**settings)
        ema_update_(averages, values, 0.3, backend="cuda")
        results.append(averages)
    assert same(*results)
