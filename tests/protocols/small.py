"""A small labelled set, backbones that take a moment, and the context of a protocol around them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from caco_fast.data import ArraySource, DataConfig, Source
from caco_fast.models import BackboneConfig
from caco_fast.pretrained import Pretrained
from caco_fast.protocols import PROTOCOLS, Context, Result
from caco_fast.settings_tree import read_settings


def images(count: int, classes: int = 3, side: int = 12, seed: int = 0, split: str = "train") -> ArraySource:
    """Noise in which the colour and a stripe give the class away."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = random.integers(0, 120, (count, side, side, 3))
    for row, label in enumerate(labels):
        pixels[row, label * 2 : label * 2 + 4, :, label % 3] += 120
    names = [f"class {label}" for label in range(classes)]
    return ArraySource(f"made up {split}", pixels.astype(np.uint8), labels, names, (0.4, 0.4, 0.4), (0.3, 0.3, 0.3))


class SmallBackbone(nn.Sequential):
    """A convolution, a BatchNorm and two layers; [B, 3, h, w] to [B, 10]."""

    num_features = 10

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(24, 10),
        )  # fmt: skip
        self[1].running_mean.fill_(0.1)
        self.eval()


class SmallContext(Context):
    """A context whose images are in memory."""

    def __init__(
        self,
        folder: Path,
        train: Source | None = None,
        test: Source | None = None,
        backbone: nn.Module | None = None,
        **options: Any,
    ) -> None:
        given = dict(device=torch.device("cpu"), autocast=None, batch_size=16, seed=0) | options
        origin = given.pop("origin", {})
        pretrained = Pretrained(backbone or SmallBackbone(), "small", BackboneConfig(), 3, origin)
        super().__init__(pretrained, DataConfig(source="embedded", workers=0), folder=folder, **given)
        self.sources = {
            "train": train or images(61),
            "test": test or images(29, seed=1, split="test"),
        }

    def source(self, split: str, data: DataConfig | None = None) -> Source:
        return self.sources[split]


def evaluate(context: Context, protocol: str, *overrides: str) -> Result:
    registered = PROTOCOLS[protocol]
    return registered.run(context, read_settings(registered.config, overrides=list(overrides)))
