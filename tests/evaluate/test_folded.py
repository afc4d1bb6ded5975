"""A backbone with folded BatchNorms has the features of the one that it came from, or is not used."""

import logging
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from caco_fast.evaluate.folded import Folded, folded


def worn(module: nn.Module) -> nn.Module:
    """The module with statistics and weights of BatchNorm as training leaves them."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.3, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    return module.eval()


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def difference(module: nn.Module, other: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        expected, found = module(images), other(images)
    return float((found - expected).norm() / expected.norm())


# ResNets, BatchNorms with an activation inside (timm's BatchNormAct2d), and some before a convolution, which stay.
@pytest.mark.parametrize(
    "name, left, options",
    [
        ("resnet18", 0, {}),
        ("resnet50", 0, {"layers": [1, 1, 1, 1]}),
        ("mobilenetv3_small_100", 0, {}),
        ("densenet121", 8, {"block_config": (1, 1, 1, 1)}),
    ],
)
def test_features_are_the_same(name: str, left: int, options: dict) -> None:
    backbone = worn(timm.create_model(name, num_classes=0, **options))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.randn(3, 3, 33, 32)
    made = folded(backbone, images)
    assert made is not backbone and norms(made) == left < norms(backbone)
    assert difference(backbone, made, torch.randn(2, 3, 40, 41)) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert folded(backbone, images, bf16) is not backbone


def test_a_training_backbone_stays_in_training() -> None:
    backbone = worn(timm.create_model("resnet18", num_classes=0)).train()
    made = folded(backbone, torch.randn(2, 3, 32, 32))
    assert backbone.training and not made.training and norms(made) == 0


class Twice(nn.Module):
    """The output of a convolution is used beside its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        found = self.conv(images)
        return (found + self.norm(found)).mean((2, 3))


class Shared(nn.Module):
    """A convolution is used twice, with a BatchNorm each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 3, 3), nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, images: Tensor) -> Tensor:
        for norm in self.norms:
            images = norm(self.conv(images))
        return images.mean((2, 3))


@pytest.mark.parametrize(
    "make, line", [(Twice, "are not folded"), (Shared, "none is folded"), (lambda: nn.Flatten(), "none is folded")]
)
def test_what_cannot_be_folded_is_left_and_said(
    make: Callable[[], nn.Module], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = worn(make())
    with caplog.at_level(logging.INFO):
        assert folded(backbone, torch.randn(2, 3, 9, 9)) is backbone
    assert line in caplog.text


def test_features_that_are_not_finite_are_not_folded() -> None:
    backbone = worn(timm.create_model("resnet18", num_classes=0))
    nn.init.constant_(backbone.conv1.weight, float("nan"))
    assert folded(backbone, torch.randn(2, 3, 32, 32)) is backbone


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_first_batch_folds(precision: torch.dtype | None) -> None:
    backbone = worn(timm.create_model("resnet18", num_classes=0))
    images = torch.randn(3, 3, 32, 32)

    def context() -> torch.autocast:
        return torch.autocast("cpu", precision, enabled=precision is not None)

    with torch.no_grad(), context():
        module = Folded(backbone, context)
        found = module(images), module(images)
        assert torch.equal(*found) and found[0].dtype == backbone(images).dtype
    assert norms(module.made) == 0
