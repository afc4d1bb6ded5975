"""A frozen backbone whose BatchNorms are folded into the convolutions before them: the same features, sooner.

In evaluation mode a BatchNorm is one scale and one shift for each channel, which the weights of the convolution can
hold. A pass over the largest maps of the network is saved for each of them.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from caco_fast.evaluate.features import evaluation_mode

# The largest error of folded features in f32, as a share of the norm of all features. In low precision the error of
# the unfolded backbone, doubled, is added: rounding to bf16 differs, but must not be worse.
BOUND = 1e-4

log = logging.getLogger(__name__)


@torch.no_grad()
def folded(
    backbone: nn.Module, images: Tensor, precision: Callable[[], AbstractContextManager] = nullcontext
) -> nn.Module:
    """A copy of the backbone in evaluation mode with its BatchNorms folded, in channels_last.

    images: a batch [b, ch, h, w] on the backbone's device. On some of them the copy is compared with the backbone,
    within `precision()`. If there is nothing to fold, or if features differ by more than rounding does, the backbone
    itself is returned, with a line in the log.
    """
    images = images[:32]
    with evaluation_mode(backbone):
        pairs = list(_pairs(backbone, images[:1]))
        if not pairs:
            log.info("no BatchNorm follows a convolution in %s, so none is folded", type(backbone).__name__)
            return backbone
        made = copy.deepcopy(backbone).eval().to(memory_format=torch.channels_last).requires_grad_(False)
        for conv, norm in pairs:
            _replace(made, conv, fuse_conv_bn_eval(made.get_submodule(conv), made.get_submodule(norm)))
            _replace(made, norm, _what_follows(made.get_submodule(norm)))
        exact = backbone(images).double()
        with precision():
            plain, found = backbone(images).double(), made(images).double()
    error, allowed = (found - exact).norm(), 2 * (plain - exact).norm() + BOUND * exact.norm()
    # Not `error > allowed`, which is false for NaN.
    if not error <= allowed:
        log.warning(
            "the features with folded BatchNorms differ by %.2g from the others, more than %.2g: they are not folded",
            error / exact.norm(),
            allowed / exact.norm(),
        )
        return backbone
    return made


class Folded(nn.Module):
    """The backbone folded at its first batch, on which it is compared; see `folded`."""

    def __init__(self, backbone: nn.Module, precision: Callable[[], AbstractContextManager] = nullcontext) -> None:
        super().__init__()
        self.backbone, self.precision = backbone, precision
        self.made: nn.Module | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.made is None:
            with torch.autocast(images.device.type, enabled=False):
                self.made = folded(self.backbone, images, self.precision)
        return self.made(images.contiguous(memory_format=torch.channels_last))


def _pairs(backbone: nn.Module, images: Tensor) -> Iterator[tuple[str, str]]:
    """Names of the convolutions and BatchNorms that are used once each, the second on the output of the first."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    calls: Counter[str] = Counter()
    found: list[tuple[str, str]] = []

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name] += 1
            if isinstance(module, nn.Conv2d):
                # The tensor is kept, so that no other one gets its id.
                outputs[id(output)] = name, output
            elif inputs and id(inputs[0]) in outputs:
                found.append((outputs[id(inputs[0])][0], name))

        return hook

    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    hooks = [
        part.register_forward_hook(after(name)) for name, part in backbone.named_modules() if isinstance(part, kinds)
    ]
    try:
        backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    used = Counter(conv for conv, _ in found)
    for conv, norm in found:
        if calls[conv] == calls[norm] == used[conv] == 1 and backbone.get_submodule(norm).running_mean is not None:
            yield conv, norm


def _what_follows(norm: nn.Module) -> nn.Module:
    """What a BatchNorm does after the normalisation: timm's BatchNormAct2d also drops and activates."""
    parts = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    return nn.Sequential(*parts) if parts else nn.Identity()


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)
