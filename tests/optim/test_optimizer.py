"""The optimiser that a configuration asks for."""

from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

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
        assert group["trust"] == 0.005


def test_peak_lr_grows_with_the_batch_unless_switched_off() -> None:
    assert peak_lr(OptimizerConfig(lr=0.3), 4096) == pytest.approx(4.8)
    assert peak_lr(OptimizerConfig(lr=0.3, scale_lr=False), 4096) == 0.3


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"name": "adam"}, "optimizer.name: found 'adam', want one of lars, sgd, adamw"),
        ({"lr": 0.0}, "optimizer.lr: must be positive, found 0.0"),
        ({"lr": float("nan")}, "optimizer.lr: must be positive, found nan"),
        ({"momentum": 1.0}, "found 1.0, 1.5e-06 and 0.001"),
        ({"weight_decay": -1.0}, "found 0.9, -1.0 and 0.001"),
        ({"backend": "gpu"}, "optimizer.backend: backend: found 'gpu', expected one of auto, reference, foreach"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        build_optimizer(OptimizerConfig(**settings), [torch.zeros(2, requires_grad=True)], batch_size=256)
    assert line in str(error.value)
