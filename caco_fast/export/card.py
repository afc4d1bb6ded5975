"""The model card of an exported backbone: how to load it, what was measured, and how it was trained."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caco_fast import __version__
from caco_fast.config import Config, to_yaml
from caco_fast.pretrained import Pretrained

# Keys of summary.json, and what they are in a table.
_MONITORS = {
    "knn_trained": "kNN of the run's monitor",
    "linear_trained": "linear probe on cached features",
    "knn_random": "the same kNN of an untrained encoder",
    "linear_random": "the same linear probe of an untrained encoder",
    "knn_raw": "the same kNN on pixels",
    "linear_raw": "the same linear probe on pixels",
}
HEAD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- self-supervised-learning
- timm
- caco_fast
---
"""


def card_of(pretrained: Pretrained, preprocessing: Mapping[str, Any]) -> str:
    """README.md of a hub folder."""
    return HEAD + "\n".join(_lines(pretrained, preprocessing)) + "\n"


def _lines(pretrained: Pretrained, preprocessing: Mapping[str, Any]) -> Iterator[str]:
    config, origin = pretrained.config, pretrained.origin
    millions = sum(value.numel() for value in pretrained.backbone.parameters()) / 1e6
    yield f"# {pretrained.title}"
    yield ""
    yield (
        f"A {pretrained.architecture.name} without a classifier: images to {pretrained.width} features, {millions:.1f} "
        f"million parameters, exported by caco_fast {__version__}."
    )
    if config is not None:
        yield f"Trained without labels by the method {config.method} on `{config.data.source}` images."
    yield "The licence is not set: whoever publishes this folder adds `license:` to the first lines."
    yield from _usage(preprocessing)
    yield from _figures(pretrained)
    if config is not None:
        yield from _recipe(config)
    yield from ("", "## Origin", "")
    for key in ("framework", "sha256", "prefix", "step", "tensors"):
        if key in origin and origin[key] != "":
            yield f"- {key}: `{origin[key]}`"
    for note in origin.get("notes", ()):
        yield f"- {note}"


def _usage(preprocessing: Mapping[str, Any]) -> Iterator[str]:
    side, crop = preprocessing["input_size"][-1], preprocessing["crop_pct"]
    yield from (
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))",
        "features = model(transform(image).unsqueeze(0))",
        "```",
        "",
        f"Preprocessing: the shorter side to {round(side / crop)} pixels, bilinear, the centre {side} x {side}, mean "
        f"{preprocessing['mean']}, std {preprocessing['std']}. With `num_classes=10` the model gets a new classifier "
        "for fine-tuning.",
    )


def _figures(pretrained: Pretrained) -> Iterator[str]:
    """Tables of what was measured: by the run itself, and by evaluations in its folder."""
    yield from ("", "## Figures", "")
    rows = [*_monitored(pretrained.folder), *_evaluated(pretrained)]
    if not rows:
        yield "Not measured."
        return
    yield from ("| protocol | result |", "|---|--:|")
    yield from (f"| {what} | {found} |" for what, found in rows)


def _monitored(folder: Path | None) -> Iterator[tuple[str, str]]:
    if folder is None:
        return
    summary = _read(folder / "summary.json")
    for key, what in _MONITORS.items():
        if isinstance(summary.get(key), (int, float)):
            yield what, f"{summary[key]:.2f} %"


def _evaluated(pretrained: Pretrained) -> Iterator[tuple[str, str]]:
    """Results of `caco-fast evaluate` for these very weights."""
    if pretrained.folder is None:
        return
    for path in sorted((pretrained.folder / "evaluation").glob("*.json")):
        record = _read(path)
        same = (record.get("source") or {}).get("sha256") == pretrained.origin.get("sha256")
        for name, value in (record.get("metrics") or {}).items() if same else ():
            if isinstance(value, (int, float)):
                yield f"{path.stem}: {name}", f"{value:.2f}"


def _read(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _recipe(config: Config) -> Iterator[str]:
    optimizer, trainer = config.optimizer, config.trainer
    yield from (
        "",
        "## Recipe",
        "",
        f"{config.method}, {trainer.epochs} epochs, batch {trainer.batch_size}, {optimizer.name}, lr {optimizer.lr}"
        f"{' for 256 images' if optimizer.scale_lr else ''}, weight decay {optimizer.weight_decay}, projector of "
        f"{config.projector.layers} layers to {config.projector.dim}.",
        "",
        "<details><summary>All settings</summary>",
        "",
        "```yaml",
        # Places of this machine are nobody else's business.
        *(line for line in to_yaml(config).splitlines() if not line.strip().startswith(("path:", "root:", "folder:"))),
        "```",
        "",
        "</details>",
    )
