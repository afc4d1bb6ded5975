"""The DALI loader's views against torchvision's on the same parameters: the bounds of the table in docs/data.md."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.tool import load_tool

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")

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
