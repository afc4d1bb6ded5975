"""Backbones: keys, stems, widths, and the lines that name a mistake."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, ProjectorConfig, build_backbone, build_encoder_pair


def test_resnet50_has_torchvisions_keys_and_shapes() -> None:
    with torch.device("meta"):
        ours = build_backbone(BackboneConfig("resnet50"), channels=3).state_dict()
        theirs = torchvision.models.resnet50().state_dict()
    wanted = {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.items()} == wanted


@pytest.mark.parametrize(
    "stem, size, first, last",
    [
        ("small", 28, 28, 4),
        ("small", 32, 32, 4),
        ("small_stride2", 28, 14, 2),
        ("small_stride2", 32, 16, 2),
        ("imagenet", 32, 16, 1),
    ],
)
def test_stems_keep_small_images_large_enough(stem: str, size: int, first: int, last: int) -> None:
    backbone = build_backbone(BackboneConfig("resnet18", stem, {"channels": [8, 8, 8, 12]}), channels=1)
    sizes: dict[str, int] = {}
    for name in ("conv1", "layer4"):
        module = backbone.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: sizes.__setitem__(name, out.shape[-1]))
    assert backbone(torch.randn(2, 1, size, size)).shape == (2, 12)
    assert sizes == {"conv1": first, "layer4": last}
    assert isinstance(backbone.maxpool, nn.Identity) == (stem != "imagenet")


def test_options_reach_the_architecture() -> None:
    deep = build_backbone(BackboneConfig("resnet18", options={"layers": [1, 2, 1, 1], "zero_init_last": False}), 3)
    assert [len(deep.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 2, 1, 1]
    assert torch.all(deep.layer1[0].bn2.weight == 1)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_the_projector_fits_the_backbones_output(name: str) -> None:
    pair = build_encoder_pair(BackboneConfig(name), ProjectorConfig(hidden=16, dim=8), channels=3)
    pair.eval()
    (embedding,) = pair.queries([torch.randn(1, 3, 32, 32)])
    assert embedding.shape == (1, 8)


def test_a_tag_names_the_weights_that_timm_gives() -> None:
    assert build_backbone(BackboneConfig("resnet18.a1_in1k", init="timm"), channels=3).num_features == 512


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"name": "resnet_50"}, "backbone.name: timm knows no architecture 'resnet_50'; nearest: resnet50,"),
        (
            {"name": "resnet18.a1_in1k"},
            "backbone.name: found 'resnet18.a1_in1k', expected an architecture alone, because the tag 'a1_in1k' names",
        ),
        ({"name": "qqqqqq"}, "backbone.name: timm knows no architecture 'qqqqqq'"),
        ({"name": "resnet18", "options": {"colour": 3}}, "backbone.options: resnet18 does not take them:"),
        ({"name": "resnet18", "options": {"num_classes": 3}}, "backbone.options: resnet18 does not take them:"),
        (
            {"name": "resnet18", "stem": "tiny"},
            "backbone.stem: found 'tiny', expected one of imagenet, small, small_stride2",
        ),
        (
            {"name": "mobilenetv3_small_050", "stem": "small"},
            "backbone.stem: 'small' is for ResNets; for mobilenetv3_small_050 use stem: imagenet",
        ),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        build_backbone(BackboneConfig(**settings), channels=3)
    assert str(error.value).startswith(line)
