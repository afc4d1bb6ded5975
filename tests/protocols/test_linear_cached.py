"""The linear evaluation on cached views against loops written by hand, and its cache."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from caco_fast.data import ViewConfig, build_train_loader
from caco_fast.data.loaders.base import epoch_order
from caco_fast.engine.ranks import Interrupted
from caco_fast.errors import UserError
from caco_fast.protocols.linear_cached import ViewCache
from tests.protocols.small import SmallBackbone, SmallContext, evaluate

QUICK = ("preset=moco", "batch_size=16", "epochs=4", "milestones=[2]", "lr=0.5", "lrs=[0.1,2]", "held_out=0")


class Counting(SmallBackbone):
    """A backbone that counts the images that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return super().forward(images)


def by_hand(views: list[torch.Tensor], labels: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The accuracy of one classifier after four epochs of 61 images, epoch e on view e mod V."""
    head = nn.Linear(10, 3)
    nn.init.zeros_(head.bias)
    head.weight.data = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)) * 0.01
    optimizer = torch.optim.SGD(head.parameters(), 0.5, momentum=0.9)
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 0.5 if epoch < 2 else 0.05
        for rows in np.array_split(epoch_order(0, epoch, 61)[:48], 3):
            loss = F.cross_entropy(head(views[epoch % len(views)][rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return 100 * (head(test[0]).argmax(1) == test[1]).double().mean().item(), loss.item()


def test_one_view_is_the_centre_crop(tmp_path):
    context = SmallContext(tmp_path)
    result = evaluate(context, "linear_cached", *QUICK, "views=1", "dtype=f32")
    train, test = (context.features(split, source=context.source(split)) for split in ("train", "test"))
    expected, _ = by_hand([train.features], train.labels, (test.features, test.labels))
    assert result.metrics["top1"] == pytest.approx(expected)


@pytest.mark.parametrize("dtype, kept", [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_views_are_those_of_the_training_loader(tmp_path, dtype, kept):
    context = SmallContext(tmp_path)
    result = evaluate(context, "linear_cached", *QUICK, "views=2", f"dtype={dtype}")
    source = context.source("train")
    view = ViewConfig(size=12, scale=(0.08, 1.0), jitter_p=0.0, grey_p=0.0, blur_p=0.0)
    loader = build_train_loader(context.data, [view], batch_size=61, seed=0, source=source)
    views = [torch.empty(61, 10) for _ in range(2)]
    with torch.no_grad():
        for epoch, rows in enumerate(views):
            (batch,) = loader.batches(epoch)
            rows[batch.index] = context.backbone(batch.views[0]).to(kept).float()
    test = context.features("test", source=context.source("test"))
    expected, _ = by_hand(views, torch.from_numpy(source.labels), (test.features, test.labels))
    assert result.metrics["top1"] == pytest.approx(expected)
    folder = next(tmp_path.glob("views-*"))
    cache = ViewCache(folder, 61, 10, kept)
    for view, rows in enumerate(views):
        torch.testing.assert_close(cache.rows(view).float(), rows, rtol=1e-2 if dtype == "bf16" else 1e-5, atol=1e-5)


def test_views_are_computed_once(tmp_path):
    backbone = Counting()
    for views, passes in ((2, 2), (2, 0), (3, 1), (1, 1)):
        backbone.seen = 0
        evaluate(SmallContext(tmp_path, backbone=backbone), "linear_cached", *QUICK, f"views={views}")
        assert backbone.seen == passes * 61 + 29
    assert len(list(tmp_path.glob("views-*"))) == 2


def test_a_stop_while_views_are_computed_keeps_the_complete_ones(tmp_path):
    backbone = Counting()
    forward = backbone.forward

    def signal_at_100(images):
        if backbone.seen < 100 <= backbone.seen + len(images):
            os.kill(os.getpid(), signal.SIGINT)
        return forward(images)

    backbone.forward = signal_at_100
    with pytest.raises(Interrupted, match="linear_cached: stopped by SIGINT in view 2"):
        evaluate(SmallContext(tmp_path, backbone=backbone), "linear_cached", *QUICK, "views=3")
    assert len(list(tmp_path.glob("views-*/*.json"))) == 1
    found = evaluate(SmallContext(tmp_path, backbone=backbone), "linear_cached", *QUICK, "views=3")
    assert found.metrics == evaluate(SmallContext(tmp_path / "new"), "linear_cached", *QUICK, "views=3").metrics


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    cache = ViewCache(tmp_path, 5, 2, torch.float32)
    cache.prepare(0)
    cache.finish(0, torch.tensor([True, False, True, True, True]))
    assert cache.unreadable(0) == [1]


def test_refuses_in_one_line(tmp_path):
    for overrides, line in (
        (["views=0"], "linear_cached.views: found 0, expected at least 1"),
        (["dtype=f16"], "linear_cached.dtype: found 'f16', expected bf16 or f32"),
        (["batch_size=62"], "linear_cached.batch_size: the training set has 61 images, fewer than one batch of 62"),
    ):
        with pytest.raises(UserError) as error:
            evaluate(SmallContext(tmp_path), "linear_cached", *QUICK, *overrides)
        assert str(error.value).startswith(line) and "\n" not in str(error.value)
