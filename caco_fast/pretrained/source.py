"""A pre-trained backbone by the text that names it: a run folder, a file, a folder, or `random:NAME`."""

import functools
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caco_fast.config import Config, config_from_yaml
from caco_fast.data.build import pixels_of
from caco_fast.distributed import rank
from caco_fast.engine.checkpoint import FORMAT, load_state
from caco_fast.models import BackboneConfig, build_backbone
from caco_fast.models.backbone import feature_width
from caco_fast.models.layouts import SIMCLR, find_backbone, input_channels
from caco_fast.models.weights import describe, fetch_weights, load_backbone, read_weights
from caco_fast.pretrained.declared import Declared, declared_by, declared_by_folder, declared_by_metadata
from caco_fast.pretrained.encoders import architecture_of
from caco_fast.pretrained.places import Place, locate, sha256_of

log = logging.getLogger("caco_fast.source")

SIMCLR_NOTE = (
    "SimCLR's converted weights take pixels in [0, 1] as they are, so mean 0 and std 1 are used; if this is another "
    "classifier, set data.mean and data.std"
)
BEST_NOTE = "checkpoint_best of CaCo and AdCo is that of the latest epoch, because their code rewrites it every epoch"


@dataclass(frozen=True)
class Pretrained:
    """A backbone with its weights, and all that is known of them."""

    # On the CPU, in f32 and in evaluation mode; it maps [B, channels, h, w] to [B, width].
    backbone: nn.Module
    # A short name, for tables and as the name of a folder.
    title: str
    architecture: BackboneConfig
    channels: int
    # What the results say of it: source, kind, path, sha256 of the file, step, framework, container, prefix, tensors,
    # left_out, notes, and trusted if pickled classes were loaded.
    origin: dict[str, Any] = field(default_factory=dict)
    # Of pixels in [0, 1], as it was trained; None: not known, so ImageNet's.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    # The settings of a run of ours, and its folder.
    config: Config | None = None
    folder: Path | None = None

    @property
    def width(self) -> int:
        return feature_width(self.backbone)

    @functools.cached_property
    def weights_sha256(self) -> str:
        """A hash of the names, shapes, dtypes and bytes of all tensors, computed once: equal for equal weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.backbone.state_dict().items()):
            digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
            # As bytes, since numpy has no bf16.
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def open_source(text: str, architecture: BackboneConfig | None = None, *, trust: bool = False) -> Pretrained:
    """The backbone that `text` names, as docs/weights.md lists them.

    architecture: of a file that does not say its own, and, if it differs from the default one, of a file that does.
    trust: whether pickled classes in a file are loaded too, which runs code of the file.

    Raises:
        UserError: there is no such source, or not every tensor of the backbone is in it.
    """
    architecture = architecture or BackboneConfig()
    kind, _, name = text.partition(":")
    if not Path(text).expanduser().exists():
        if kind == "random":
            return _random(text, replace(architecture, name=name or architecture.name))
        if kind in ("timm", "torchvision"):
            return _fetched(text, kind, name or architecture.name)
    place = locate(text)
    tree, declared = _contents(place, trust)
    if tree.get("format") == FORMAT:
        return _of_checkpoint(text, place)
    given = architecture if architecture != BackboneConfig() else None
    made = _of_file(text, place, tree, declared, given or declared.architecture or architecture)
    return replace(made, origin=made.origin | {"trusted": True}) if trust else made


def _random(text: str, architecture: BackboneConfig) -> Pretrained:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(architecture, 3).eval()
    return Pretrained(backbone, f"random-{architecture.name}", architecture, 3, {"source": text, "kind": "random"})


def _fetched(text: str, kind: str, name: str) -> Pretrained:
    """A backbone with the pretrained weights of timm or torchvision."""
    architecture = BackboneConfig(name.partition(".")[0])
    backbone = build_backbone(architecture, 3)
    tree = fetch_weights(kind, name, 3, {}, f"source: {text}")
    weights = find_backbone(tree, _shapes(backbone), f"source: {text}")
    load_backbone(backbone, weights)
    pixels = getattr(backbone, "pretrained_cfg", {}) if kind == "timm" else {}
    origin = {"source": text, "kind": kind, "framework": kind, "tensors": len(weights.state)}
    mean, std = pixels.get("mean"), pixels.get("std")
    return Pretrained(
        backbone.eval(), f"{kind}-{name}", architecture, 3, origin, tuple(mean) if mean else None, std and tuple(std)
    )


def _contents(place: Place, trust: bool) -> tuple[Mapping[str, Any], Declared]:
    """What a file holds, and what it says of itself."""
    tree = read_weights(str(place.path), "source", trust)
    if place.hub:
        return tree, declared_by_folder(place.path.parent, "source")
    if place.path.suffix == ".safetensors":
        return tree, declared_by_metadata(place.path)
    return tree, declared_by(tree)


def _of_checkpoint(text: str, place: Place) -> Pretrained:
    """The backbone of one of our checkpoints."""
    state = load_state(place.path)
    config = config_from_yaml(state["config"])
    made = _of_file(text, place, {"state": state}, Declared(), architecture_of(config))
    mean, std = pixels_of(config.data)
    return replace(
        made,
        origin=made.origin | {"kind": "run" if place.run else "checkpoint", "step": state["position"]["total_steps"]},
        mean=mean,
        std=std,
        config=config,
        folder=place.run if place.latest and not place.encoder else None,
    )


def _of_file(
    text: str, place: Place, tree: Mapping[str, Any], declared: Declared, architecture: BackboneConfig
) -> Pretrained:
    with torch.device("meta"):
        wanted = _shapes(build_backbone(architecture, 3))
    channels = input_channels(tree, wanted)
    backbone = build_backbone(architecture, channels)
    weights = find_backbone(tree, _shapes(backbone), f"source: {place.path}", place.encoder)
    load_backbone(backbone, weights)
    mean, std, notes = declared.mean, declared.std, []
    if weights.framework == SIMCLR:
        mean, std = (0.0,) * channels, (1.0,) * channels
        notes.append(SIMCLR_NOTE)
    if weights.framework in ("CaCo", "AdCo") and "best" in place.path.name:
        notes.append(BEST_NOTE)
    if rank() == 0:
        log.info("backbone: %s", describe(weights, str(place.path)))
        for note in notes:
            log.warning("%s", note)
    origin = {
        "source": text,
        "kind": "folder" if place.hub else "file",
        "path": str(place.path),
        "sha256": sha256_of(place.path),
        "framework": weights.framework,
        "container": weights.container,
        "prefix": weights.prefix,
        "tensors": len(weights.state),
        "left_out": weights.left_out,
        "notes": notes,
    }
    return Pretrained(backbone.eval(), place.name, architecture, channels, origin, mean, std)


def _shapes(backbone: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in backbone.state_dict().items()}
