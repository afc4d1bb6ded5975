"""A pre-trained backbone by the text that names it: a run folder, a file, a folder, or `random:NAME`."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caco_fast.config import Config, config_from_yaml
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, build_backbone
from caco_fast.models.backbone import feature_width
from caco_fast.models.weights import find_backbone


@dataclass(frozen=True)
class Pretrained:
    """A backbone with its weights, and all that is known of them."""

    # On the CPU, in f32 and in evaluation mode; it maps [B, channels, h, w] to [B, width].
    backbone: nn.Module
    # A short name, for tables and as the name of a folder.
    title: str
    architecture: BackboneConfig
    channels: int
    # What the results say of it: source, kind, path, sha256 of the file, step, container, prefix, tensors, left_out.
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

    @cached_property
    def weights_sha256(self) -> str:
        """A hash of the names, shapes, dtypes and bytes of all tensors, computed once: equal for equal weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.backbone.state_dict().items()):
            digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
            # As bytes, since numpy has no bf16.
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def open_source(text: str, architecture: BackboneConfig | None = None) -> Pretrained:
    """The backbone that `text` names; `architecture` is that of a file which does not say its own.

    Raises:
        UserError: there is no such source, or not every tensor of the backbone is in it.
    """
    architecture = architecture or BackboneConfig()
    kind, _, name = text.partition(":")
    if kind == "random":
        architecture = BackboneConfig(name=name or architecture.name, stem=architecture.stem)
        torch.manual_seed(0)
        backbone = build_backbone(architecture, 3).eval()
        return Pretrained(backbone, f"random-{architecture.name}", architecture, 3, {"source": text, "kind": "random"})
    path = Path(text).expanduser()
    if (path / "checkpoints").is_dir():
        return _of_run(path)
    raise UserError(f"source: found '{text}', expected a run folder or random:NAME")


def _of_run(folder: Path) -> Pretrained:
    store = CheckpointStore(folder / "checkpoints")
    latest = store.latest()
    if latest is None:
        raise UserError(f"source: {folder} has no checkpoint yet")
    state = store.load(latest)
    config = config_from_yaml(state["config"])
    encoders = state["encoders"]
    first = next(value for name, value in encoders.items() if name.startswith("query.backbone.") and value.ndim == 4)
    backbone = build_backbone(config.backbone, first.shape[1])
    wanted = {key: value.shape for key, value in backbone.state_dict().items()}
    weights = find_backbone({"state": {"encoders": encoders}}, wanted, f"source: {latest}")
    backbone.load_state_dict(weights.state)
    origin = {
        "source": str(folder),
        "kind": "run",
        "path": str(latest),
        "sha256": hashlib.sha256(latest.read_bytes()).hexdigest(),
        "step": state["position"]["total_steps"],
        "container": weights.container,
        "prefix": weights.prefix,
        "tensors": len(weights.state),
        "left_out": weights.left_out,
    }
    mean, std = config.data.mean, config.data.std
    return Pretrained(
        backbone.eval(),
        folder.resolve().name,
        config.backbone,
        first.shape[1],
        origin,
        tuple(mean) if mean else None,
        tuple(std) if std else None,
        config,
        folder,
    )
