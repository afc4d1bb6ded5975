"""LARS against one tensor at a time, in f64."""

import copy

import pytest
import torch
from torch import Tensor

from caco_fast.optim import LARS

LR, MOMENTUM, DECAY, TRUST = 0.3, 0.9, 0.01, 0.02

SHAPES = {"matrix": (4, 3), "convolution": (2, 3, 3, 3), "bias": (5,), "scalar": (), "zero matrix": (3, 3)}


def make_params() -> dict[str, Tensor]:
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    params["zero matrix"].zero_()
    return {name: p.requires_grad_() for name, p in params.items()}


def by_hand(
    weights: dict[str, Tensor], velocity: dict[str, Tensor], grads: dict[str, Tensor], lr: float, inside: bool
) -> None:
    """One step of You et al. on each tensor by itself, in plain numbers where a norm is concerned."""
    for name, grad in grads.items():
        direction = grad.clone()
        if grad.ndim > 1:
            direction += DECAY * weights[name]
            weight_norm = sum(x * x for x in weights[name].flatten().tolist()) ** 0.5
            grad_norm = sum(x * x for x in direction.flatten().tolist()) ** 0.5
            if weight_norm > 0 and grad_norm > 0:
                direction *= TRUST * weight_norm / grad_norm
        velocity[name] = MOMENTUM * velocity[name] + (lr * direction if inside else direction)
        weights[name] -= velocity[name] if inside else lr * velocity[name]


@pytest.mark.parametrize("inside", [False, True], ids=["lr outside", "lr in velocity"])
def test_several_steps_match_a_loop_over_tensors(inside: bool) -> None:
    params = make_params()
    weights = {name: p.detach().clone() for name, p in params.items()}
    velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
    optimizer = LARS(list(params.values()), LR, MOMENTUM, DECAY, TRUST, inside)
    for step in range(5):
        lr = LR / (step + 1)
        optimizer.param_groups[0]["lr"] = lr
        grads = {name: torch.randn_like(w) for name, w in weights.items()}
        if step == 2:
            del grads["bias"]
        for name, p in params.items():
            p.grad = grads[name].clone() if name in grads else None
        optimizer.step()
        by_hand(weights, velocity, grads, lr, inside)
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), weights[name], rtol=0, atol=1e-13, msg=f"{name} at step {step}")
    assert weights["zero matrix"].abs().sum() > 0


def test_a_zero_gradient_without_decay_leaves_a_tensor_where_it_is() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    LARS([weight], LR, weight_decay=0.0).step()
    assert torch.equal(weight, before)


def test_gradients_are_left_as_they_were() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    LARS([weight], LR).step()
    assert torch.equal(weight.grad, torch.ones(3, 3))


def test_state_dict_goes_on_bit_for_bit() -> None:
    grads = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES.values()] for _ in range(4)]

    def run(params: list[Tensor], optimizer: LARS, steps: list[list[Tensor]]) -> None:
        for step in steps:
            for p, grad in zip(params, step):
                p.grad = grad.clone()
            optimizer.step()

    straight = list(make_params().values())
    optimizer = LARS(straight, LR)
    run(straight, optimizer, grads[:2])
    resumed = [p.detach().clone().requires_grad_() for p in straight]
    other = LARS(resumed, 1.0, momentum=0.1)
    # A copy, as from a file: state_dict() hands out the velocities themselves.
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == LR
    run(straight, optimizer, grads[2:])
    run(resumed, other, grads[2:])
    for a, b in zip(straight, resumed):
        assert torch.equal(a, b)


def test_closure_is_run_with_gradient() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer = LARS([weight], LR)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert not torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust"])
def test_a_negative_setting_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"LARS: {name} must not be negative, found -0.5"):
        LARS([torch.zeros(2, requires_grad=True)], **{"lr": 0.1, name: -0.5})
