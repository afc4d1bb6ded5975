"""The DALI loader's views against torchvision's, on the same parameters and for several recipes.

The recipes besides CaCo's are linear training, MoCo v2's pair of views and AdCo's five sizes. The bounds are those of
the table in docs/data.md.

Legend: B images, V views of each, ch channels, s x s pixels of a view.
"""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from caco_fast.config import load_config
from caco_fast.data import DataConfig, ViewConfig
from caco_fast.data.sources.folder import FolderSource
from caco_fast.data.views.batched import finish_crops
from caco_fast.data.views.draws import draw_views
from tests.tool import load_tool

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")

from caco_fast.data.loaders.dali import DaliLoader

# Mean and largest difference in grey levels; PIL's own rounding after each of several operations is most of it.
BOUNDS = {
    "decode, crop, resize": (0.1, 2),
    "the same by DALI alone, as on a GPU": (0.4, 16),
    "flip": (0.1, 2),
    "brightness": (0.7, 3),
    "contrast about the mean grey": (0.7, 3),
    "saturation": (0.7, 3),
    "hue in HSV": (1.0, 30),
    "jitter, exact: all four, in random order": (1.8, 40),
    "grey": (0.4, 3),
    "blur": (0.8, 4),
    "solarise": (0.1, 255),
    "view a, exact": (1.6, 40),
    "view b, exact": (1.8, 255),
    "small crop of 96, exact": (1.8, 40),
}
FAST = {"jitter, fast", "view a, fast", "view b, fast", "small crop of 96, fast"}

# RandomResizedCrop and flip alone.
LINEAR = ViewConfig(size=224, scale=(0.08, 1.0), jitter_p=0, grey_p=0, blur_p=0)
CONFIGS = Path(__file__).parents[2] / "caco_fast" / "configs"
MOCO = load_config(CONFIGS / "imagenet_resnet50_mocov2_200ep.yaml", ["data.path=."]).views
# Smaller crops of smaller parts.
ADCO = [ViewConfig(size=size, scale=(0.2 * size / 224, size / 224)) for size in (224, 192, 160, 128, 96)]
SEED = 3


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("check/views")


def test_every_operation_and_the_whole_view_are_torchvisions_within_bounds(
    tool: ModuleType, pictures: list[Path]
) -> None:
    records, shown = tool.compare(pictures)
    found = {record["operation"]: (record["mean"], record["max"]) for record in records}
    assert found.keys() == BOUNDS.keys() | FAST
    over = {name: found[name] for name, bounds in BOUNDS.items() if any(np.array(found[name]) > bounds)}
    assert over == {}
    # Fast is another jitter, but no other picture.
    assert all(1 < found[name][0] < 12 for name in FAST)
    assert tool.contact_sheet(shown, 2).size == (12 * 228, 2 * 228)


def test_crops_are_distributed_as_torchvisions(tool: ModuleType) -> None:
    assert all(found["p"] > 0.001 for found in tool.distributions())


def test_the_test_of_distributions_sees_a_difference(tool: ModuleType) -> None:
    generator = np.random.default_rng(0)
    left, right = generator.uniform(0, 1, 5000), generator.uniform(0, 1, 5000)
    assert tool.same_distribution(left, right)["p"] > 0.01
    assert tool.same_distribution(left, right**1.2)["p"] < 0.001


@pytest.fixture
def source(pictures: list[Path]) -> FolderSource:
    return FolderSource(str(pictures[0].parent))


def first_views(source: FolderSource, recipe: list[ViewConfig], batch_size: int) -> tuple[list[torch.Tensor], list]:
    """V views [B, ch, s, s] in grey levels of the first step; and for each its settings, draws and torchvision's crops.

    The crops [B, s, s, ch] uint8, flips included, are cut by PIL on the same draws.
    """
    # 0 to 1 is left as it is.
    config = DataConfig(path=".", loader="dali", workers=1, mean=[0.0] * 3, std=[1.0] * 3)
    loader = DaliLoader(source, config, recipe, batch_size=batch_size, seed=SEED)
    batch = next(loader.batches(0))
    loader.close()
    images = [source.image(position) for position in batch.index.tolist()]
    width, height = np.array([image.size for image in images]).T
    views, made = [view for view in recipe for _ in range(view.count)], []
    for number, view in enumerate(views):
        options = dict(seed=SEED, epoch=0, index=batch.index.numpy(), view=np.full(len(images), number))
        draws = draw_views(view, height, width, 3, **options)
        crops = [F.resized_crop(image, *box, [view.size] * 2) for image, box in zip(images, draws.box.tolist())]
        crops = [F.horizontal_flip(crop) if flip else crop for crop, flip in zip(crops, draws.flip)]
        made.append((view, draws, torch.from_numpy(np.stack([np.asarray(crop) for crop in crops]))))
    return [view * 255 for view in batch.views], made


def test_linear_trainings_views_are_torchvisions_to_a_grey_level(source: FolderSource) -> None:
    (ours,), ((_, draws, crops),) = first_views(source, [LINEAR], 8)
    assert set(draws.flip.tolist()) == {False, True}
    apart = (ours.permute(0, 2, 3, 1) - crops).abs()
    assert ours.shape == (8, 3, 224, 224) and apart.max() < 1.01 and apart.mean() < 0.1


@pytest.mark.parametrize("recipe", [MOCO, ADCO], ids=["MoCo v2", "AdCo"])
def test_every_view_is_its_own_crop_finished_by_its_own_draws(source: FolderSource, recipe: list[ViewConfig]) -> None:
    ours, made = first_views(source, recipe, 4)
    sizes = [224, 224] if recipe is MOCO else [224, 192, 160, 128, 96]
    assert [tuple(view.shape) for view in ours] == [(4, 3, size, size) for size in sizes]
    for mine, (view, draws, crops) in zip(ours, made, strict=True):
        theirs = finish_crops(crops, draws, view, torch.zeros(3), torch.ones(3)) * 255
        apart = (mine - theirs).abs()
        # A level of the crop, and what the jitter makes of it.
        assert apart.mean() < 0.3 and (apart > 3).float().mean() < 0.001
    boxes = [draws.box for _, draws, _ in made]
    assert not any(np.array_equal(boxes[0], other) for other in boxes[1:])
