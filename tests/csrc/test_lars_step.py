"""lars_step_ on emulated kernels, against the formula in f64."""

import math

import pytest
import torch
from torch import Tensor

from caco_fast.ops import lars_step_
from tests.csrc.tensor_lists import copies, flag, make, same

# The kernels are the same on every path.
pytestmark = pytest.mark.parametrize("path", [80], indirect=True)

SETTINGS = dict(lr=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)


def lists(device: torch.device, misaligned: bool = False) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients and velocities; the first parameter and the last gradient are zero."""
    generator = torch.Generator().manual_seed(0)
    params, grads = make(generator, device), make(generator, device, misaligned)
    params[0].zero_()
    grads[-1].zero_()
    return params, grads, make(generator, device)


def exact(params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], scale: float = 1.0):
    """One step in f64, tensor by tensor."""
    stepped = []
    for w, g, v in zip(params, grads, velocities, strict=True):
        w, d, v = w.double(), g.double() / scale, v.double()
        if w.ndim > 1:
            d = d + SETTINGS["weight_decay"] * w
            weight_norm, norm = math.sqrt(w.square().sum()), math.sqrt(d.square().sum())
            if weight_norm > 0 and norm > 0:
                d = SETTINGS["trust"] * weight_norm / norm * d
        v = SETTINGS["momentum"] * v + d
        stepped.append((w - SETTINGS["lr"] * v, v))
    return stepped


def assert_close(params: list[Tensor], velocities: list[Tensor], wanted) -> None:
    for w, v, (exact_w, exact_v) in zip(params, velocities, wanted, strict=True):
        # A few roundings of numbers up to 6.
        torch.testing.assert_close(v.double(), exact_v, rtol=3e-7, atol=1e-6)
        torch.testing.assert_close(w.double(), exact_w, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_lars_follows_the_formula_for_several_steps(cuda_ops, device, misaligned):
    params, grads, velocities = lists(device, misaligned)
    for _ in range(2):
        wanted, kept = exact(params, grads, velocities), copies(grads)
        lars_step_(params, grads, velocities, **SETTINGS, backend="cuda")
        assert_close(params, velocities, wanted)
        assert same(grads, kept)
        grads = [g.neg() for g in grads]  # in other memory, as after a backward pass


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_lars_takes_the_norms_of_unscaled_gradients(cuda_ops, device, scale):
    params, grads, velocities = lists(device)
    scaled = [g * scale for g in grads]
    wanted = exact(params, grads, velocities)
    lars_step_(params, scaled, velocities, **SETTINGS, grad_scale=flag(scale, device), backend="cuda")
    assert_close(params, velocities, wanted)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_lars_is_skipped_where_the_flag_is_set(cuda_ops, device, value):
    params, grads, velocities = lists(device)
    grads[9].view(-1)[7] = value
    before = copies(params), copies(velocities)
    lars_step_(params, grads, velocities, **SETTINGS, skip=flag(1.0, device), backend="cuda")
    assert same(params, before[0]) and same(velocities, before[1])


def test_lars_with_a_flag_that_is_not_set_steps(cuda_ops, device):
    params, grads, velocities = lists(device)
    wanted = exact(params, grads, velocities)
    lars_step_(params, grads, velocities, **SETTINGS, skip=flag(0.0, device), backend="cuda")
    assert_close(params, velocities, wanted)


def test_lars_of_tensors_of_one_dimension_alone(cuda_ops, device):
    params, grads, velocities = ([tensor.flatten() for tensor in tensors] for tensors in lists(device))
    wanted = exact(params, grads, velocities)
    lars_step_(params, grads, velocities, **SETTINGS, backend="cuda")
    assert_close(params, velocities, wanted)


def test_lars_gives_the_same_bits_for_any_alignment(cuda_ops, device):
    """The order of the sums does not hang on where the allocator put a gradient."""
    results = []
    for misaligned in (False, True):
        params, grads, velocities = lists(device, misaligned)
        lars_step_(params, grads, velocities, **SETTINGS, backend="cuda")
        results.append(params + velocities)
    assert same(*results)


@pytest.mark.parametrize("schedule", [dict(seed=1), dict(seed=5, greedy=True)], ids=["reversed", "greedy"])
def test_lars_under_every_schedule_gives_the_same_bits(cuda_ops, device, emulated, schedule):
    results = []
    for settings in ({}, schedule):
        params, grads, velocities = lists(device)
        emulated.set_schedule(**settings)
        lars_step_(params, grads, velocities, **SETTINGS, backend="cuda")
        results.append(params + velocities)
    assert same(*results)
