"""A folder in Hugging Face's layout that timm reads: config.json, model.safetensors, and README.md as a model card."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

from caco_fast.data import DataConfig
from caco_fast.data.build import pixels_of
from caco_fast.errors import UserError
from caco_fast.export.base import image_side, largest_difference, register, require_same, tensors_of
from caco_fast.export.card import card_of
from caco_fast.export.state_dicts import metadata_of, timm_model
from caco_fast.pretrained import Pretrained

# Of a published evaluation: the shorter side to 256, the centre 224.
CROP = 0.875


def write_hub(pretrained: Pretrained, folder: Path) -> None:
    require_same("hub", pretrained, timm_model("hub", pretrained))
    config = hub_config(pretrained)
    folder.mkdir()
    save_file(tensors_of(pretrained), folder / "model.safetensors", metadata_of(pretrained))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(card_of(pretrained, config["pretrained_cfg"]))


def hub_config(pretrained: Pretrained) -> dict[str, Any]:
    """timm's config.json, with the preprocessing of these weights and nothing of timm's own for the architecture."""
    mean, std = pretrained.mean, pretrained.std
    if mean is None or std is None:
        if pretrained.channels != 3:
            raise UserError(
                f"hub: mean and std of the {pretrained.channels} channels are not known, which config.json must say; "
                "take timm instead, or a run as the source"
            )
        mean, std = pixels_of(DataConfig())
    model, data = pretrained.backbone, pretrained.config.data if pretrained.config else None
    side = image_side(pretrained)
    if data is None:
        crop = CROP
    else:
        crop = data.eval_size / data.eval_resize if data.eval_size and data.eval_resize else 1.0
    known: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    described = {
        "tag": "caco_fast",
        "custom_load": False,
        "input_size": [pretrained.channels, side, side],
        "fixed_input_size": bool(known.get("fixed_input_size", False)),
        "interpolation": "bilinear",
        "crop_pct": round(crop, 4),
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
    }
    config: dict[str, Any] = {
        "architecture": pretrained.architecture.name,
        "num_classes": 0,
        "num_features": pretrained.width,
        "global_pool": str(known.get("global_pool") or getattr(model, "global_pool", "") or "avg"),
        "pretrained_cfg": described,
    }
    if not isinstance(getattr(model, "global_pool", ""), str):
        config["global_pool"] = getattr(model.global_pool, "pool_type", "avg")
    if pretrained.architecture.options:
        config["model_args"] = dict(pretrained.architecture.options)
    return config


def verify_hub(pretrained: Pretrained, folder: Path) -> float:
    """Read it by timm's loader of local folders, without a classifier and with a new one."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, in_chans=pretrained.channels)
    timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10, in_chans=pretrained.channels)
    return largest_difference(pretrained, model.eval())


register("hub", write_hub, verify_hub, "a folder for timm and the Hugging Face hub, with a model card")
