"""The linear evaluation on cached views against loops written by hand, and its cache."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caco_fast.data import ViewConfig, build_train_loader
from caco_fast.data.loaders.base import epoch_order
from caco_fast.errors import UserError
from tests.protocols.small import SmallBackbone, SmallContext, evaluate

QUICK = ("preset=moco", "batch_size=16", "epochs=4", "milestones=[2]", "lr=0.5", "lrs=[0.1,2]", "held_out=0")


class Counting(SmallBackbone):
    """A backbone that counts the images that pass, through copies of it too."""

    seen = 0

    def forward(self, images):
        Counting.seen += len(images)
        return super().forward(images)


def by_hand(views: list[Tensor], labels: Tensor, test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy and last mean loss of a classifier after four epochs on 61 images, epoch e on view e mod V."""
    head = nn.Linear(10, 3)
    nn.init.zeros_(head.bias)
    head.weight.data = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)) * 0.01
    optimizer = torch.optim.SGD(head.parameters(), 0.5, momentum=0.9)
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 0.5 if epoch < 2 else 0.05
        losses = []
        for rows in np.array_split(epoch_order(0, epoch, 61)[:48], 3):
            loss = F.cross_entropy(head(views[epoch % len(views)][rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return 100 * (head(test[0]).argmax(1) == test[1]).double().mean().item(), float(np.mean(losses))


def test_one_view_is_the_centre_crop(tmp_path):
    context = SmallContext(tmp_path)
    result = evaluate(context, "linear_cached", *QUICK, "views=1")
    train, test = (context.features(split, source=context.source(split)) for split in ("train", "test"))
    expected, _ = by_hand([train.features], train.labels, (test.features, test.labels))
    assert result.metrics["top1"] == pytest.approx(expected)


def test_views_are_those_of_the_training_loader(tmp_path):
    context = SmallContext(tmp_path)
    result = evaluate(context, "linear_cached", *QUICK, "views=2")
    source = context.source("train")
    view = ViewConfig(size=12, scale=(0.08, 1.0), jitter_p=0.0, grey_p=0.0, blur_p=0.0)
    loader = build_train_loader(context.data, [view], batch_size=61, seed=0, source=source)
    views = [torch.empty(61, 10) for _ in range(2)]
    with torch.no_grad():
        for epoch, rows in enumerate(views):
            (batch,) = loader.batches(epoch)
            rows[batch.index] = context.backbone(batch.views[0])
    test = context.features("test", source=context.source("test"))
    accuracy, loss = by_hand(views, torch.from_numpy(source.labels), (test.features, test.labels))
    row = next(row for row in result.sweep if row["lr"] == 0.5)
    assert row["top1"] == pytest.approx(accuracy) and row["loss"] == pytest.approx(loss, rel=1e-4)


def test_views_are_computed_once(tmp_path):
    backbone = Counting()
    for views, least in ((2, 2 * 61 + 29), (2, 0), (3, 61), (1, 61)):
        Counting.seen = 0
        evaluate(SmallContext(tmp_path, backbone=backbone), "linear_cached", *QUICK, f"views={views}")
        # Some more to compare the folded backbone with this one.
        assert least <= Counting.seen <= (least + 2 * 61 if least else 0)


def test_refuses_in_one_line(tmp_path):
    for overrides, line in (
        (["views=0"], "linear_cached.views: found 0, expected at least 1"),
        (["batch_size=62"], "linear_cached.batch_size: the training set has 61 images, fewer than one batch of 62"),
    ):
        with pytest.raises(UserError) as error:
            evaluate(SmallContext(tmp_path), "linear_cached", *QUICK, *overrides)
        assert str(error.value).startswith(line) and "\n" not in str(error.value)
