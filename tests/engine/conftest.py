"""Images for runs, and the emulated kernels for tests of what a run does with them."""

from pathlib import Path

import pytest

from tests.engine.tiny_run import write_images
from tests.ops.backends import cuda_ops, emulated, filled_memory, path

__all__ = ["cuda_ops", "emulated", "filled_memory", "images", "path"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images for `tiny_run.config`."""
    return write_images(tmp_path_factory.mktemp("images"))
