"""SmallAlexNet: its shapes, the sizes that it takes, its weights in and out, and the encoders made of it."""

from pathlib import Path

import pytest
import timm
import torch

from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, ProjectorConfig, build_backbone, build_encoder_pair, require_sizes
from caco_fast.models.batch_norm import separable

SMALL = {"width": 8}


def test_it_has_the_shapes_of_the_published_one() -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig("small_alexnet", options={"img_size": 64}), channels=3)
    weights = [tuple(p.shape) for name, p in backbone.named_parameters() if p.dim() > 1]
    assert weights == [
        *((96, 3, 3, 3), (192, 96, 3, 3), (384, 192, 3, 3), (384, 384, 3, 3), (192, 384, 3, 3)),
        *((4096, 192 * 7 * 7), (4096, 4096)),
    ]
    assert backbone.num_features == 4096 and "small_alexnet" in timm.list_models()
    assert not any(name.endswith("0.bias") for name in backbone.state_dict()), "BatchNorm has the biases"


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_an_encoder_of_it_embeds_grey_and_colour_images(channels: int, side: int) -> None:
    config = BackboneConfig("small_alexnet", options={**SMALL, "img_size": side})
    pair = build_encoder_pair(config, ProjectorConfig(layers=1, dim=4), channels, joint_views=True)
    assert separable(pair.query)
    rows = pair.queries([torch.randn(3, channels, side, side)] * 2)
    assert [tuple(view.shape) for view in rows] == [(3, 4), (3, 4)]
    rows[0].sum().backward()
    assert all(value.grad is not None for value in pair.query.parameters())
    assert pair.query.backbone.fc7[0].weight.std().item() < 0.04


def test_other_sizes_are_refused_with_the_option_that_takes_them() -> None:
    config = BackboneConfig("small_alexnet", options=SMALL)
    require_sizes(config, {"views[0].size": (32, 32)})
    with pytest.raises(UserError, match=r"views\[0\].size: found images of 64 x 64 .*; add {img_size: 64} to"):
        require_sizes(config, {"views[0].size": (64, 64)})
    with pytest.raises(UserError, match="found images of 14 x 14 .*; take other sizes or another backbone"):
        require_sizes(config, {"views[0].size": (14, 14)})
    with pytest.raises(UserError, match="does not take them: img_size: found 14, expected 15 or more"):
        build_backbone(BackboneConfig("small_alexnet", options={"img_size": 14}), channels=3)


def test_its_weights_go_into_a_file_and_back(tmp_path: Path) -> None:
    config = BackboneConfig("small_alexnet", options=SMALL)
    backbone = build_backbone(config, channels=3)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    projector = ProjectorConfig(layers=1, dim=4)
    init = BackboneConfig("small_alexnet", options=SMALL, init=str(tmp_path / "backbone.pt"))
    found = build_encoder_pair(init, projector, channels=3).query.backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in backbone.state_dict().items())
    with_classifier = timm.create_model("small_alexnet", num_classes=3, **SMALL)
    assert with_classifier(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(UserError, match="backbone.init: timm gives no weights for small_alexnet"):
        build_encoder_pair(BackboneConfig("small_alexnet", options=SMALL, init="timm"), projector, channels=3)
