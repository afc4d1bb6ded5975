"""Small sets of images for the tests of the data.

Legend: N images.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caco_fast.data import ArraySource


@pytest.fixture
def colour_source() -> ArraySource:
    """50 random images of 12 x 12 pixels in 5 classes."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (50, 12, 12, 3), dtype=np.uint8)
    return ArraySource("random", images, np.arange(50) % 5, list("abcde"), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Writes a JPEG of random pixels (another one for each seed), with the folders it needs."""

    def write(path: Path, seed: int = 0, width: int = 24, height: int = 20) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, "JPEG")
        return path

    return write


@pytest.fixture
def image_folder(tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    """ImageNet's layout: train/{ant,bee} with 6 images each, val/{ant,bee} with 2 each."""
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                write_image(tmp_path / split / name / f"{name}_{number}.JPEG", seed=100 * label + number)
    return tmp_path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight JPEG files of differing sizes: smooth shapes, edges and a little noise."""
    generator, paths = np.random.default_rng(0), []
    folder = tmp_path_factory.mktemp("pictures")
    for number, (width, height) in enumerate([(500, 375), (375, 500), (333, 500), (640, 480), (250, 188)] * 2):
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC)).astype(float)
        y, x = np.mgrid[0:height, 0:width]
        inside = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (height / 4) ** 2
        pixels += inside[..., None] * generator.uniform(-80, 80, 3) + generator.normal(0, 4, pixels.shape)
        paths.append(folder / f"{number}.JPEG")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=92)
    return paths[:8]


@pytest.fixture(params=["torchvision", "dali"])
def loader_name(request: pytest.FixtureRequest) -> str:
    """Each of the loaders that read files, DALI's where it is installed."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    return request.param
