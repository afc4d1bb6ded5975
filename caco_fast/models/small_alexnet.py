"""SmallAlexNet: AlexNet for small images, with BatchNorm, as an architecture that timm knows by the name small_alexnet.

Source: CMC (Tian et al., arXiv 1906.05849), in the form of Wang and Isola (arXiv 2005.10242) that CACR takes over.

Legend: B images, h x w pixels.
"""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

# Channels of the convolutions, and which of them a 3x3 pooling of stride 2 follows.
CONVOLUTIONS = ((96, True), (192, True), (384, False), (384, False), (192, True))
SMALLEST = 15  # pixels, of which three poolings leave one
_OF_WEIGHTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class SmallAlexNet(nn.Module):
    """Five 3x3 convolutions, fc6 and fc7; the features are those of fc7.

    img_size: side of the images, on which the width of fc6's input depends. num_classes: 0 leaves out the classifier.

    Raises:
        TypeError: the images are too small for three poolings.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, img_size: int = 32, width: int = 4096) -> None:
        super().__init__()
        if img_size < SMALLEST:
            raise TypeError(f"img_size: found {img_size}, expected {SMALLEST} or more")
        self.num_classes, self.num_features = num_classes, width
        channels, side = in_chans, img_size
        blocks: list[nn.Module] = []
        for out, pools in CONVOLUTIONS:
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, out, kernel_size=3, padding=1, bias=False),
                    nn.BatchNorm2d(out),
                    nn.ReLU(inplace=True),
                    *([nn.MaxPool2d(3, 2)] if pools else []),
                )
            )
            channels, side = out, (side - 3) // 2 + 1 if pools else side
        self.convolutions = nn.Sequential(*blocks)
        self.fc6 = _fully_connected(channels * side * side, width)
        self.fc7 = _fully_connected(width, width)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def forward_features(self, images: Tensor) -> Tensor:  # [B, in_chans, h, w] -> [B, width]
        return self.fc7(self.fc6(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:  # [B, in_chans, h, w] -> [B, width or num_classes]
        return self.head(self.forward_features(images))


def _fully_connected(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register_model
def small_alexnet(pretrained: bool = False, **options: Any) -> SmallAlexNet:
    """The architecture with random weights: none are published with it.

    Raises:
        ValueError: pretrained weights are asked for.
    """
    if pretrained:
        raise ValueError("there are no pretrained weights of it")
    # timm tells every architecture where its weights are.
    return SmallAlexNet(**{name: value for name, value in options.items() if name not in _OF_WEIGHTS})
