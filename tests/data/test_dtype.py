"""Views leave every loader in the dtype that the encoder computes in: computed in float32, rounded once."""

from pathlib import Path

import pytest
import torch

from caco_fast.data import Batch, DataConfig, ViewConfig, build_train_loader

VIEWS = [ViewConfig(count=2, size=16, blur_p=0.5, solarize_p=0.2), ViewConfig(size=8, scale=(0.1, 0.3))]


def batches(config: DataConfig, dtype: torch.dtype) -> list[Batch]:
    loader = build_train_loader(config, VIEWS, batch_size=4, seed=0, dtype=dtype)
    found = list(loader.batches(0))
    loader.close()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("jitter", ["exact", "fast"])
@pytest.mark.parametrize("name", ["memory", "dali", "torchvision"])
def test_views_are_those_in_float32_rounded_once(
    image_folder: Path, name: str, jitter: str, dtype: torch.dtype
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    if name == "torchvision" and jitter == "fast":
        pytest.skip("the torchvision loader has no fast jitter")
    config = DataConfig(path=str(image_folder), loader=name, jitter=jitter, workers=0)
    for found, wanted in zip(batches(config, dtype), batches(config, torch.float32), strict=True):
        assert torch.equal(found.index, wanted.index)
        for view, exact in zip(found.views, wanted.views, strict=True):
            assert view.dtype == dtype and exact.dtype == torch.float32
            assert torch.equal(view, exact.to(dtype)) and view.stride() == exact.stride()
