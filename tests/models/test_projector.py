"""The projection heads of CaCo and MoCo v2."""

import pytest
import torch
from torch import nn

from caco_fast.errors import UserError
from caco_fast.models import ProjectorConfig, build_projector


def layout(projector: nn.Sequential) -> list[str]:
    names = []
    for module in projector:
        if isinstance(module, nn.Linear):
            names.append(f"{module.in_features}-{module.out_features}{'' if module.bias is None else ' bias'}")
        else:
            names.append(type(module).__name__)
    return names


def test_default_is_cacos_head_without_a_last_batch_norm() -> None:
    with torch.device("meta"):
        projector = build_projector(ProjectorConfig(), features=2048)
    hidden = ["2048-2048", "BatchNorm1d", "ReLU"]
    assert layout(projector) == [*hidden, *hidden, "2048-256"]


def test_moco_v2s_head() -> None:
    projector = build_projector(ProjectorConfig(layers=2, hidden=24, dim=8, batch_norm=False, bias=True), features=16)
    assert layout(projector) == ["16-24 bias", "ReLU", "24-8 bias"]


def test_one_layer_is_linear() -> None:
    assert layout(build_projector(ProjectorConfig(layers=1, dim=8), features=16)) == ["16-8"]


@pytest.mark.parametrize("field", ["layers", "hidden", "dim"])
def test_sizes_below_1_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"projector.{field}: found 0, expected at least 1"):
        build_projector(ProjectorConfig(**{field: 0}), features=16)
