"""What a foreign file says of its architecture and of the pixels that it was trained on."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm

from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig

# Names of architectures in checkpoints that differ from timm's. MoCo v3's small ViT has twice the heads of timm's, of
# which the shapes of its tensors say nothing.
OTHER_NAMES = {
    "vit_small": BackboneConfig("vit_small_patch16_224", options={"num_heads": 12}),
    "vit_base": BackboneConfig("vit_base_patch16_224"),
}
# DINO's names, each with the size of a patch.
PATCHED = {"vit_tiny": "vit_tiny_patch{}_224", "vit_small": "vit_small_patch{}_224", "vit_base": "vit_base_patch{}_224"}


class Declared(NamedTuple):
    """An architecture, and mean and deviation of the pixels in [0, 1]; None where the file doesn't say."""

    architecture: BackboneConfig | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def declared_by(tree: Mapping[str, Any]) -> Declared:
    """What a checkpoint says by its `arch` or by the arguments of its training."""
    name, arguments = tree.get("arch"), tree.get("args")
    patch = None
    if isinstance(arguments, (Namespace, Mapping)):
        held: Mapping[str, Any] = arguments if isinstance(arguments, Mapping) else vars(arguments)
        name, patch = name or held.get("arch"), held.get("patch_size")
    if not isinstance(name, str):
        return Declared()
    if patch and name in PATCHED:
        return Declared(BackboneConfig(PATCHED[name].format(patch)))
    if name in OTHER_NAMES:
        return Declared(OTHER_NAMES[name])
    return Declared(BackboneConfig(name) if timm.is_model(name) else None)


def declared_by_metadata(path: Path) -> Declared:
    """What a safetensors file of ours says in its metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "caco_fast" not in metadata or "backbone" not in metadata:
        return Declared()
    held, pixels = json.loads(metadata["backbone"]), json.loads(metadata.get("pixels", "{}"))
    return Declared(BackboneConfig(**held), _numbers(pixels.get("mean")), _numbers(pixels.get("std")))


def declared_by_folder(folder: Path, key: str) -> Declared:
    """What config.json of a timm folder says. UserError if it is not timm's."""
    path = folder / "config.json"
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} can't be read ({error}); fetch it again") from None
    name = held.get("architecture") if isinstance(held, dict) else None
    if not isinstance(name, str):
        kind = held.get("model_type", "unknown") if isinstance(held, dict) else type(held).__name__
        raise UserError(
            f"{key}: found {path} without `architecture` (model type {kind}), expected that of a timm model; "
            "convert it, or give its file of weights"
        )
    pixels = held.get("pretrained_cfg") or {}
    arguments = held.get("model_args") or {}
    options = {option: value for option, value in arguments.items() if option not in ("num_classes", "in_chans")}
    return Declared(BackboneConfig(name, options=options), _numbers(pixels.get("mean")), _numbers(pixels.get("std")))


def _numbers(values: Any) -> tuple[float, ...] | None:
    return tuple(float(value) for value in values) if values else None
