"""Backbones: any timm architecture without its classifier."""

import difflib
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

from caco_fast.errors import UserError
from caco_fast.settings import setting, switch

STEMS = ("imagenet", "small", "small_stride2")


@dataclass(frozen=True)
class BackboneConfig:
    name: str = setting("resnet50", "timm architecture; resnet50 has torchvision's state_dict keys")
    stem: str = setting(
        "imagenet",
        "imagenet: the architecture's own; small: 3x3 convolution without pooling (ResNets at 28/32 px); "
        "small_stride2: the same at stride 2",
    )
    options: dict[str, Any] = setting(
        {}, "more keyword arguments of the timm architecture, e.g. {layers: [1, 1, 1, 1]}"
    )
    apex: str = setting(
        "off", "BatchNorm, ReLU and addition of a ResNet as groupbn of NVIDIA Apex, in fp16: on, off, or auto: if built"
    )
    init: str = setting(
        "", "weights to start from: a file or run (see docs/weights.md), timm or torchvision; empty: random ones"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "apex", switch("backbone.apex", self.apex))
        if self.stem not in STEMS:
            raise UserError(f"backbone.stem: found '{self.stem}', expected one of {', '.join(STEMS)}")


def build_backbone(config: BackboneConfig, channels: int) -> nn.Module:
    """The architecture with `channels` input channels; it maps [B, channels, h, w] to [B, feature_width].

    Raises:
        UserError: unknown architecture, a tag of weights without backbone.init=timm, an option that it does not take,
            or a stem that does not fit it.
    """
    architecture, _, tag = config.name.partition(".")
    if tag and config.init != "timm":
        raise UserError(
            f"backbone.name: found '{config.name}', expected an architecture alone, because the tag '{tag}' names "
            f"weights; set backbone.init=timm to begin from them, or backbone.name={architecture}"
        )
    try:
        backbone = timm.create_model(config.name, pretrained=False, num_classes=0, in_chans=channels, **config.options)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"backbone.name: timm knows no architecture '{config.name}'{hint}") from None
    except TypeError as error:
        raise UserError(f"backbone.options: {config.name} does not take them: {error}") from None
    if config.stem != "imagenet":
        _use_small_stem(backbone, config, channels)
    return backbone


def feature_width(backbone: nn.Module) -> int:
    """Channels of the backbone's output. timm's `num_features` counts those of the last map; MobileNetV3 widens it."""
    return getattr(backbone, "head_hidden_size", None) or backbone.num_features


def _use_small_stem(backbone: nn.Module, config: BackboneConfig, channels: int) -> None:
    """Replace the 7x7 stride-2 convolution and the pooling of a ResNet, as SimCLR does for CIFAR-10."""
    first, pool = getattr(backbone, "conv1", None), getattr(backbone, "maxpool", None)
    if not isinstance(first, nn.Conv2d) or pool is None:
        raise UserError(f"backbone.stem: '{config.stem}' is for ResNets; for {config.name} use stem: imagenet")
    stride = 2 if config.stem == "small_stride2" else 1
    conv = nn.Conv2d(channels, first.out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    backbone.conv1, backbone.maxpool = conv, nn.Identity()
