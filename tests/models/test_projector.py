"""The projection heads of CaCo and MoCo v2."""

import pytest
import torch
from torch import nn

from caco_fast.errors import UserError
from caco_fast.models import ProjectorConfig, build_mlp, build_projector, segment_batch_norm
from caco_fast.models.batch_norm import add_norm_sets, segmented


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


def test_simclrs_head_has_a_batch_norm_after_each_layer() -> None:
    projector = build_projector(ProjectorConfig(layers=2, hidden=24, dim=8, last_batch_norm="affine"), features=16)
    assert layout(projector) == ["16-24", "BatchNorm1d", "ReLU", "24-8", "BatchNorm1d"]
    assert all(value.requires_grad for value in projector.parameters())


def test_a_plain_last_batch_norm_normalises_and_is_not_trained() -> None:
    config = ProjectorConfig(layers=2, hidden=24, dim=8, last_batch_norm="plain")
    projector = segment_batch_norm(build_projector(config, features=16))
    add_norm_sets(projector, 2)
    *_, last = projector
    for norm in (last, last.further[0]):
        assert not any(value.requires_grad for value in norm.parameters())
    for norm_set in (0, 1):
        with segmented(projector, 1, norm_set):
            rows = projector(torch.randn(32, 16) * 3 + 1)
        torch.testing.assert_close(rows.mean(dim=0), torch.zeros(8), rtol=0, atol=1e-5)
        torch.testing.assert_close(rows.var(dim=0, unbiased=False), torch.ones(8), rtol=0, atol=1e-3)
    assert len(list(projector[1].further[0].parameters())) == 2
    assert all(value.requires_grad for value in projector[1].further[0].parameters())


def test_an_mlp_has_any_widths() -> None:
    mlp = build_mlp([6, 5, 4, 3], batch_norm=False, bias=True)
    assert layout(mlp) == ["6-5 bias", "ReLU", "5-4 bias", "ReLU", "4-3 bias"]


def test_an_unknown_last_batch_norm_is_refused() -> None:
    with pytest.raises(UserError, match="projector.last_batch_norm: found 'yes', expected one of none, affine, plain"):
        ProjectorConfig(last_batch_norm="yes")


@pytest.mark.parametrize("field", ["layers", "hidden", "dim"])
def test_sizes_below_1_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"projector.{field}: found 0, expected at least 1"):
        build_projector(ProjectorConfig(**{field: 0}), features=16)
