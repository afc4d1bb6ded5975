"""A backbone with a fixed input size is asked before a run for every size of images, and the line names the option."""

from typing import Any

import pytest
import torch

from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, require_sizes
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images

VIT = BackboneConfig("vit_tiny_patch16_224", options={"depth": 1})


def refusal(backbone: BackboneConfig, *sides: int) -> str:
    with pytest.raises(UserError) as error:
        require_sizes(backbone, {f"views[{i}].size": (side, side) for i, side in enumerate(sides)})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, options, sides, line",
    [
        ("vit_tiny_patch16_224", {"depth": 1}, (32,), "views[0].size: .*32 x 32.*; add {img_size: 32} to"),
        (
            "vit_tiny_patch16_224",
            {"depth": 1},
            (224, 96),
            "views[1].size: .*96 x 96.*; add {dynamic_img_size: true} to",
        ),
        (
            "vit_tiny_patch16_224",
            {"depth": 1, "dynamic_img_size": True},
            (100,),
            "by patch size (16)); take other sizes or another backbone",
        ),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1]}, (32,), "; add {img_size: 32} to"),
        ("inception_v3", {}, (32,), "views[0].size: .*; take other sizes or another backbone"),
    ],
)
def test_a_size_that_does_not_fit_is_named_with_the_option(
    name: str, options: dict[str, Any], sides: tuple[int, ...], line: str
) -> None:
    found = refusal(BackboneConfig(name, options=options), *sides)
    for part in line.split(".*"):
        assert part in found
    assert name in found


@pytest.mark.parametrize(
    "sides, options", [((224,), {}), ((32,), {"img_size": 32}), ((224, 96), {"dynamic_img_size": True})]
)
def test_the_named_option_is_right_and_no_random_state_changes(sides: tuple[int, ...], options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    backbone = BackboneConfig(VIT.name, options={**VIT.options, **options})
    require_sizes(backbone, {str(side): (side, side) for side in sides})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings, line",
    [
        (["views=[{count: 2, size: 32}, {size: 16}]"], "views[1].size: found images of 16 x 16 pixels"),
        (["data.eval_size=64"], "data.eval_size: found images of 64 x 64 pixels"),
        # The images have 40 pixels.
        ([], "data.eval_size: found images of 40 x 40 pixels"),
    ],
)
def test_a_run_refuses_before_it_trains(settings: list[str], line: str, tmp_path: Any) -> None:
    vit = ["backbone={name: vit_tiny_patch16_224, stem: imagenet}", "backbone.options={}"]
    options = "backbone.options={depth: 1, img_size: 32, embed_dim: 24}"
    made = config(write_images(tmp_path / "images", test=1), *vit, options, *settings)
    with pytest.raises(UserError) as error:
        train(made, tmp_path / "run")
    assert str(error.value).startswith(line)
    assert not (tmp_path / "run").exists()
