"""The sizes of images that a backbone can take, found by a forward without data before a run begins."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from caco_fast.errors import UserError
from caco_fast.models.backbone import BackboneConfig, build_backbone

Size = tuple[int, int]  # height, width


def require_sizes(config: BackboneConfig, sizes: Mapping[str, Size]) -> None:
    """Raise UserError for the first of `sizes`, by the name of its setting, that the backbone can't take.

    The line names the options with which the backbone takes all of them, if there are any. No random state changes.
    """
    refused = _refused(config, sizes.values(), ("meta", "cpu"))
    for key, (height, width) in sizes.items():
        if reason := refused.get((height, width)):
            found = f"{key}: found images of {height} x {width} pixels, but {config.name} can't take them ({reason})"
            raise UserError(f"{found}; {_remedy(config, sizes.values())}")


def _refused(config: BackboneConfig, sizes: Iterable[Size], devices: Iterable[str]) -> dict[Size, str]:
    """The sizes that the backbone can't take, each with the reason."""
    left = dict.fromkeys(sizes, "")
    # Tensors of the meta device have shapes only. Where these don't suffice, the next device decides.
    for device in devices:
        if not left:
            break
        with torch.random.fork_rng(devices=[]), torch.device(device):
            try:
                backbone = build_backbone(config, channels=3).eval()
            except (RuntimeError, NotImplementedError) as error:
                left = dict.fromkeys(left, _first_line(error))
                continue
            left = {size: reason for size in left if (reason := _reason(backbone, size))}
    return left


@torch.no_grad()
def _reason(backbone: nn.Module, size: Size) -> str:
    """Why the backbone can't take images of this size; "" if it can."""
    try:
        backbone(torch.zeros(1, 3, *size))
    # Each architecture has exceptions of its own for this.
    except Exception as error:
        return _first_line(error)
    return ""


def _remedy(config: BackboneConfig, sizes: Iterable[Size]) -> str:
    sizes = list(sizes)
    largest = max(max(size) for size in sizes)
    dynamic: dict[str, Any] = {"dynamic_img_size": True}
    for options in ({"img_size": largest}, dynamic, {"img_size": largest, **dynamic}):
        try:
            refused = _refused(replace(config, options={**config.options, **options}), sizes, ("meta",))
        except UserError:  # The architecture has no such option.
            continue
        if not refused:
            text = ", ".join(f"{name}: {str(value).lower()}" for name, value in options.items())
            return f"add {{{text}}} to backbone.options"
    return "take other sizes or another backbone"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
