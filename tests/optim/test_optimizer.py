"""The optimiser that a configuration asks for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from caco_fast.errors import UserError
from caco_fast.optim import LARS, OptimizerConfig, build_optimizer, peak_lr


@pytest.mark.parametrize("name, kind", [("lars", LARS), ("sgd", SGD), ("adamw", AdamW)])
def test_name_and_settings_reach_the_optimiser(name: str, kind: type) -> None:
    config = OptimizerConfig(name=name, lr=0.3, momentum=0.8, weight_decay=0.02, trust=0.005)
    optimizer = build_optimizer(config, iter([torch.zeros(2, 2, requires_grad=True)]), batch_size=1024)
    group = optimizer.param_groups[0]
    assert type(optimizer) is kind
    assert group["lr"] == pytest.approx(1.2)
    assert group["weight_decay"] == 0.02
    if name != "adamw":
        assert group["momentum"] == 0.8
    if name == "lars":
        assert group["trust"] == 0.005 and not group["lr_in_velocity"]


def test_adamw_without_decay_is_adam() -> None:
    weights = [torch.arange(6.0).view(2, 3).requires_grad_() for _ in range(2)]
    config = OptimizerConfig(name="adamw", lr=0.01, scale_lr=False, weight_decay=0.0)
    optimizers = build_optimizer(config, weights[:1], 256), Adam(weights[1:], lr=0.01)
    for _ in range(3):
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = weight.detach().sin()
            optimizer.step()
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_one_dimensional_tensors_may_be_left_out_of_the_decay(name: str) -> None:
    for decay_1d in (True, False):
        weight, bias = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
        config = OptimizerConfig(name=name, lr=0.1, scale_lr=False, weight_decay=0.5, decay_1d=decay_1d)
        optimizer = build_optimizer(config, [weight, bias], 256)
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        optimizer.step()
        torch.testing.assert_close(weight, torch.full((2, 3), 0.95))
        torch.testing.assert_close(bias, torch.full((3,), 0.95 if decay_1d else 1.0))


def test_peak_lr_grows_with_the_batch_unless_switched_off() -> None:
    assert peak_lr(OptimizerConfig(lr=0.3), 4096) == pytest.approx(4.8)
    assert peak_lr(OptimizerConfig(lr=0.3, scale_lr=False), 4096) == 0.3


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"name": "adam"}, "optimizer.name: found 'adam', expected one of lars, sgd, adamw"),
        ({"lr": 0.0}, "optimizer.lr: found 0.0, expected a number above 0"),
        ({"lr": float("nan")}, "optimizer.lr: found nan, expected a number above 0"),
        ({"momentum": 1.0}, "optimizer.momentum: found 1.0, expected a number in [0, 1)"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay: found -1.0, expected 0 or more"),
        ({"trust": 0.0}, "optimizer.trust: found 0.0, expected a number above 0"),
        ({"lr_in_velocity": True, "name": "sgd"}, "optimizer.lr_in_velocity: it is a setting of lars, not of sgd; set"),
        ({"apex": "on", "name": "lars"}, "optimizer.apex: Apex serves sgd here, not lars; set it to off or auto"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        OptimizerConfig(**settings)
    assert line in str(error.value)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_loaded_state_keeps_its_tensors_and_takes_the_new_settings(name: str) -> None:
    def make(momentum: float, decay: float, trust: float) -> tuple[torch.Tensor, torch.optim.Optimizer]:
        weight = torch.ones(2, 3, requires_grad=True)
        config = OptimizerConfig(name=name, lr=0.1, momentum=momentum, weight_decay=decay, trust=trust)
        return weight, build_optimizer(config, [weight], batch_size=256)

    (weight, before), (other, after) = make(0.9, 0.1, 0.01), make(0.5, 0.2, 0.02)
    weight.grad = torch.full((2, 3), 3.0)
    before.step()
    if name == "adamw":
        before.param_groups[0].update(betas=(0.5, 0.6), eps=1e-3)
    own = {key: value for key, value in after.param_groups[0].items() if key != "params"}
    after.load_state_dict(before.state_dict())
    assert {key: value for key, value in after.param_groups[0].items() if key != "params"} == own
    assert own["weight_decay"] == 0.2 and own.get("momentum", 0.5) == 0.5 and own.get("trust", 0.02) == 0.02
    kept, loaded = before.state[weight], after.state[other]
    assert kept.keys() == loaded.keys() and all(torch.equal(kept[key], loaded[key]) for key in kept)


def test_a_resumed_run_with_other_groups_says_which_setting_makes_them() -> None:
    weights = [torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)]
    config = OptimizerConfig(name="adamw")
    before, after = (build_optimizer(replace(config, decay_1d=decay), weights, 256) for decay in (True, False))
    with pytest.raises(UserError, match="set optimizer.decay_1d as it was"):
        after.load_state_dict(before.state_dict())
