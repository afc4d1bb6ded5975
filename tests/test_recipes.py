"""Every shipped configuration gives encoders and a method that fit its views, made without memory for their weights."""

from pathlib import Path

import pytest
import torch

from caco_fast.build import method_sections
from caco_fast.config import load_config
from caco_fast.configs import shipped
from caco_fast.methods import build_method, registered
from caco_fast.models import build_encoder_pair, require_sizes


@pytest.mark.parametrize("path", shipped().values(), ids=lambda path: path.stem)
def test_a_recipe_builds(path: Path) -> None:
    config = load_config(path)
    sections = method_sections(config)
    needs = registered(config.method).method.needs(sections[config.method], sections)
    with torch.device("meta"):
        pair = build_encoder_pair(
            config.backbone,
            config.projector,
            channels=1 if config.data.source == "embedded" else 3,
            key_encoder=needs.key_encoder,
            norm_sets=needs.norm_sets,
            norm_images=config.trainer.batch_norm_images,
        )
        method = build_method(config.method, config.projector.dim, sections)
    method.check_views([view.size for view in config.views for _ in range(view.count)])
    require_sizes(config.backbone, {f"views[{n}].size": (view.size, view.size) for n, view in enumerate(config.views)})
    assert (pair.key is not None) == needs.key_encoder
