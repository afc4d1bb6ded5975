"""Files of tensors by name: torchvision, timm, lightly and solo-learn, safetensors."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from caco_fast import __version__
from caco_fast.config import to_yaml
from caco_fast.errors import UserError
from caco_fast.export.base import (
    INSTEAD,
    largest_difference,
    register,
    require_own_stem,
    require_same,
    tensors_of,
)
from caco_fast.models import build_backbone
from caco_fast.models.layouts import CLASSIFIERS
from caco_fast.pretrained import Pretrained, open_source


def metadata_of(pretrained: Pretrained) -> dict[str, str]:
    """What a safetensors file says of its tensors: text alone, as that format takes it."""
    origin, config = pretrained.origin, pretrained.config
    architecture = pretrained.architecture
    known = {
        "format": "pt",
        "caco_fast": __version__,
        "backbone": json.dumps(
            {key: value for key, value in asdict(architecture).items() if key not in ("init", "apex")}
        ),
        "pixels": json.dumps({"mean": pretrained.mean, "std": pretrained.std}) if pretrained.mean else "",
        "source_sha256": str(origin.get("sha256", "")),
        "step": str(origin.get("step", "")),
        "config": to_yaml(config) if config else "",
    }
    return {key: value for key, value in known.items() if value}


def timm_model(name: str, pretrained: Pretrained, **options: Any) -> nn.Module:
    """timm's own architecture without a classifier. UserError if timm alone doesn't build this backbone."""
    architecture = pretrained.architecture
    require_own_stem(name, pretrained)
    if not timm.models.model_entrypoint(architecture.name).__module__.startswith("timm."):
        raise UserError(f"{name}: timm alone has no {architecture.name}; {INSTEAD}")
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(
            architecture.name, num_classes=0, in_chans=pretrained.channels, **architecture.options, **options
        )


def torchvision_model(name: str, pretrained: Pretrained) -> nn.Module:
    """torchvision's own architecture. UserError if it has none with the backbone's tensors."""
    architecture = pretrained.architecture.name
    if architecture not in torchvision.models.list_models():
        raise UserError(f"{name}: torchvision has no {architecture}; {INSTEAD}")
    require_own_stem(name, pretrained)
    with torch.random.fork_rng(devices=[]):
        model = torchvision.models.get_model(architecture, weights=None)
    require_same(name, pretrained, model, CLASSIFIERS)
    return model


def write_torchvision(pretrained: Pretrained, path: Path) -> None:
    torchvision_model("torchvision", pretrained)
    torch.save(tensors_of(pretrained), path)


def verify_torchvision(pretrained: Pretrained, path: Path) -> float:
    return torchvision_difference("torchvision", pretrained, torch.load(path, weights_only=True))


def torchvision_difference(name: str, pretrained: Pretrained, state: dict[str, Tensor]) -> float:
    """Features by torchvision's model with these tensors, which must be all but the classifier's."""
    model = torchvision_model(name, pretrained)
    keys = model.load_state_dict(state, strict=False)
    if keys.unexpected_keys or not all(key.startswith(CLASSIFIERS) for key in keys.missing_keys):
        return float("inf")
    for classifier in {key.partition(".")[0] for key in keys.missing_keys}:
        setattr(model, classifier, nn.Identity())
    return largest_difference(pretrained, model.eval())


def write_timm(pretrained: Pretrained, path: Path) -> None:
    require_same("timm", pretrained, timm_model("timm", pretrained))
    if path.suffix == ".safetensors":
        save_file(tensors_of(pretrained), path, metadata_of(pretrained))
    else:
        torch.save(tensors_of(pretrained), path)


def verify_timm(pretrained: Pretrained, path: Path) -> float:
    model = timm_model("timm", pretrained, checkpoint_path=str(path))
    return largest_difference(pretrained, model.eval())


def write_lightly(pretrained: Pretrained, path: Path) -> None:
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in tensors_of(pretrained).items()}}, path)


def verify_lightly(pretrained: Pretrained, path: Path) -> float:
    """Both cut `backbone.` from the names under `state_dict`."""
    held = torch.load(path, weights_only=True)["state_dict"]
    model = build_backbone(pretrained.architecture, pretrained.channels)
    model.load_state_dict({key.replace("backbone.", "", 1): value for key, value in held.items()})
    return largest_difference(pretrained, model.eval())


def write_safetensors(pretrained: Pretrained, path: Path) -> None:
    save_file(tensors_of(pretrained), path, metadata_of(pretrained))


def verify_safetensors(pretrained: Pretrained, path: Path) -> float:
    return largest_difference(pretrained, open_source(str(path)).backbone)


_FILES = (".pth", ".pt")
register("torchvision", write_torchvision, verify_torchvision, "a state_dict of torchvision, without fc", _FILES)
register("timm", write_timm, verify_timm, "a file for timm's checkpoint_path", (".safetensors", *_FILES))
register(
    "safetensors",
    write_safetensors,
    verify_safetensors,
    "any architecture, with its settings inside",
    (".safetensors",),
)
register("lightly", write_lightly, verify_lightly, "state_dict as lightly and solo-learn have it", (".ckpt", *_FILES))
