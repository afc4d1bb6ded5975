"""The linear evaluation against a loop written by hand, its choices, its stops and its refusals."""

import dataclasses
import logging
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from caco_fast.data import ViewConfig, build_train_loader
from caco_fast.engine.ranks import Interrupted
from caco_fast.errors import UserError
from caco_fast.protocols import head_training, linear
from caco_fast.protocols.base import Context
from caco_fast.protocols.heads import Heads
from caco_fast.protocols.presets import choose, preset_names, preset_of
from tests.protocols.small import SmallContext, evaluate, images

QUICK = ("preset=moco", "batch_size=16", "epochs=3", "milestones=[2]", "lr=0.5", "lrs=[0.1,2]")


class Made:
    """The heads that a protocol makes."""

    def __init__(self, monkeypatch):
        self.all: list[Heads] = []
        monkeypatch.setattr(linear, "Heads", self)

    def __call__(self, *arguments, **options):
        self.all.append(Heads(*arguments, **options))
        return self.all[-1]


def test_equals_a_loop_written_by_hand_to_the_bit(tmp_path, monkeypatch):
    torch.manual_seed(5)
    backbone = torchvision.models.resnet18().eval()
    backbone.fc, backbone.num_features = nn.Identity(), 512
    context = SmallContext(tmp_path, images(19, side=32), images(11, side=32, seed=1), backbone, seed=7)
    # Folded BatchNorms give the same features to rounding.
    context.folded = context.backbone
    made = Made(monkeypatch)
    result = evaluate(
        context, "linear", "preset=simsiam", "optimizer=sgd", "batch_size=8", "epochs=2", "lr=0.3",
        "lr_scaling=none", "lrs=[0.3]", "held_out=0", "weight_decay=1e-4",
    )  # fmt: skip

    view = ViewConfig(size=32, scale=(0.08, 1.0), jitter_p=0.0, grey_p=0.0, blur_p=0.0)
    loader = build_train_loader(context.data, [view], batch_size=8, seed=7, source=context.sources["train"])
    head = nn.Linear(512, 3)
    nn.init.zeros_(head.bias)
    head.weight.data = torch.randn(3, 512, generator=torch.Generator().manual_seed(7)) * 0.01
    optimizer = torch.optim.SGD(head.parameters(), 0.3, momentum=0.9, weight_decay=1e-4)
    labels = torch.from_numpy(context.sources["train"].labels)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.3 * 0.5 * (1 + math.cos(math.pi * epoch / 2))
        losses = []
        for batch in loader.batches(epoch):
            with torch.no_grad():
                features = backbone(batch.views[0].contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(head(features), labels[batch.index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert torch.equal(made.all[0].weight[0], head.weight) and torch.equal(made.all[0].bias[0], head.bias)
    # With a batch of the same size, the loss too; its mean is in f64.
    assert result.sweep[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    test = context.features("test", source=context.source("test"))
    assert result.metrics["top1"] == pytest.approx(100 * (head(test.features).argmax(1) == test.labels).float().mean())


def test_several_rates_give_what_each_gives_alone(tmp_path):
    several = evaluate(SmallContext(tmp_path), "linear", *QUICK)
    assert [row["lr"] for row in several.sweep] == [0.1, 0.5, 2.0]
    for row in several.sweep:
        alone = evaluate(SmallContext(tmp_path), "linear", *QUICK[:-2], f"lr={row['lr']}", f"lrs=[{row['lr']}]")
        assert alone.sweep[0] == pytest.approx(row, rel=1e-5)


def test_the_headline_is_the_last_epoch_of_the_rate_of_the_preset(tmp_path):
    result = evaluate(SmallContext(tmp_path), "linear", *QUICK, "held_out=12")
    row = {row["lr"]: row for row in result.sweep}[0.5]
    assert result.metrics["top1"] == row["top1"] and next(iter(result.metrics)) == "top1"
    assert result.metrics["top1_published_rule"] == row["best"] >= row["top1"]
    best = max(result.sweep, key=lambda row: row["held_out"])
    assert f"lr {best['lr']:.4g}, the best one on the held-out images" in result.notes[1]
    assert result.metrics["top1_lr_chosen_on_held_out"] == best["top1"]
    assert result.counts["images"]["train"]["found"] == 49 and result.counts["images"]["held_out"]["found"] == 12
    share = row["top1"] / 100
    assert result.standard_error == pytest.approx(100 * math.sqrt(share * (1 - share) / 29))


def test_says_what_differs_from_the_preset(tmp_path):
    deviations = evaluate(SmallContext(tmp_path), "linear", *QUICK).deviations
    assert deviations["linear.epochs"] == {"found": 3, "preset": 100}
    assert deviations["linear.lr"] == {"found": 0.5, "preset": 30.0}
    assert deviations["linear.held_out"] == {"found": 3, "preset": 0}
    assert deviations["data.eval_size"] == {"found": None, "preset": 224}
    assert deviations["linear.size"] == {"found": 12, "preset": 224}
    assert "linear.momentum" not in deviations
    assert "linear.held_out" not in evaluate(SmallContext(tmp_path), "linear", *QUICK, "held_out=0").deviations


def test_eight_rates_around_that_of_the_preset(tmp_path):
    result = evaluate(SmallContext(tmp_path), "linear", "preset=caco", "batch_size=16", "epochs=1")
    assert len(result.sweep) == 8
    assert 0.025 * 16 / 256 in [row["lr"] for row in result.sweep]


@pytest.mark.parametrize(
    "framework, preset",
    [
        ("MoCo v2", "moco"), ("MoCo v3", "mocov3"), ("SwAV or DeepCluster v2", "swav"), ("Barlow Twins", "barlow"),
        ("DINO", "dino"), ("SimCLR (sthalles)", "simclr"), ("caco_fast", "caco"), ("names of torchvision", "caco"),
        (None, "caco"),
    ],
)  # fmt: skip
def test_the_preset_is_that_of_the_framework(tmp_path, framework, preset):
    pretrained = SmallContext(tmp_path, origin={"framework": framework}).pretrained
    assert preset_of(pretrained, "linear", "caco") == preset


# Of the table of protocols: optimiser, lr at the preset's batch, batch, epochs, weight decay, milestones.
TABLE = {
    "caco": ("larc", 0.4, 4096, 100, 0, []),
    "moco": ("sgd", 30, 256, 100, 0, [60, 80]),
    "adco": ("sgd", 10, 256, 100, 0, []),
    "simsiam": ("larc", 1.6, 4096, 90, 0, []),
    "mocov3": ("sgd", 0.4, 1024, 90, 0, []),
    "simclr": ("sgd", 1.6, 4096, 90, 0, []),
    "swav": ("sgd", 0.3, 256, 100, 1e-6, []),
    "barlow": ("sgd", 0.3, 256, 100, 1e-6, []),
    "vicreg": ("sgd", 0.02, 256, 100, 1e-6, []),
    "byol": ("sgd", 0.8, 1024, 80, 0, []),
    "dino": ("sgd", 0.3, 256, 100, 0, []),
    "vissl": ("sgd", 0.01, 256, 28, 5e-4, [8, 16, 24]),
    "places205": ("sgd", 0.01, 256, 14, 5e-4, [4, 8, 12]),
    "inat18": ("sgd", 0.01, 256, 84, 5e-4, [24, 48, 72]),
}


@pytest.mark.parametrize("preset", preset_names("linear"))
def test_presets_are_the_published_ones(preset):
    recipe = choose(linear.LinearConfig(), head_training.LinearRecipe, "linear", "linear", preset).recipe
    lrs = recipe.all_lrs()
    if preset == "dinov2":
        assert len(lrs) == 13 and lrs[0] == pytest.approx(4e-5) and lrs[-1] == pytest.approx(0.4)
        return
    found = (recipe.optimizer, lrs[recipe.headline], recipe.batch_size, recipe.epochs, recipe.weight_decay)
    assert found == pytest.approx(TABLE[preset][:-1]) and recipe.milestones == TABLE[preset][-1]
    assert len(lrs) == (5 if preset == "byol" else 8)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_stopped_evaluation_continues_to_the_same_result(tmp_path, monkeypatch, steps):
    whole = evaluate(SmallContext(tmp_path / "a"), "linear", *QUICK)
    step, done = Heads.step, []

    def step_then_signal(self, *arguments):
        done.append(step(self, *arguments))
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return done[-1]

    monkeypatch.setattr(Heads, "step", step_then_signal)
    with pytest.raises(Interrupted, match="linear: stopped by SIGTERM in epoch") as stopped:
        evaluate(SmallContext(tmp_path / "b"), "linear", *QUICK)
    assert stopped.value.exit_code == 128 + signal.SIGTERM and len(done) == steps
    assert evaluate(SmallContext(tmp_path / "b"), "linear", *QUICK) == whole
    assert len(done) == 9
    assert not list((tmp_path / "b").glob("*.state"))


def test_a_state_of_other_settings_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(head_training.Resumable, "finished", lambda self: self.save({"step": "none"}, now=True))
    evaluate(SmallContext(tmp_path), "linear", *QUICK)
    evaluate(SmallContext(tmp_path), "linear", *QUICK, "weight_decay=0.1")
    evaluate(SmallContext(tmp_path, seed=1), "linear", *QUICK)
    assert len(list(tmp_path.glob("linear-*.state"))) == 3


def test_a_damaged_state_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(head_training.Resumable, "finished", lambda self: self.path.write_bytes(b"no"))
        evaluate(SmallContext(tmp_path), "linear", *QUICK)
    with pytest.raises(UserError, match=r"linear: .*\.state can't be read .*; remove it"):
        evaluate(SmallContext(tmp_path), "linear", *QUICK)


def test_warns_of_heads_that_learn_nothing_or_diverge(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "caco_fast.evaluation"):
        evaluate(SmallContext(tmp_path), "linear", *QUICK[:-1], "lrs=[1e-9,1e38]")
    assert "still that of guessing, 1.099, for lr 1e-09; it is too small" in caplog.text
    assert "the head of lr 1e+38 has a loss of" in caplog.text and "the other heads train further" in caplog.text


def test_a_backbone_that_changes_is_an_error(tmp_path):
    class Moving(nn.Flatten):
        num_features = 432

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, images):
            self.calls += 1
            return super().forward(images)

    with pytest.raises(RuntimeError, match="the backbone changed"):
        evaluate(SmallContext(tmp_path, backbone=Moving()), "linear", *QUICK)


def test_the_backbone_stays_in_evaluation_mode(tmp_path):
    context = SmallContext(tmp_path)
    context.backbone.train()
    before = context.backbone[1].running_mean.clone()
    evaluate(context, "linear", *QUICK)
    assert torch.equal(context.backbone[1].running_mean, before) and context.backbone.training


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["preset=moko"], "linear.preset: found 'moko', expected one of adco, barlow, byol, caco"),
        (["batch_size=62"], "linear.batch_size: found 62, expected no more than the 58 training images"),
        (["epochs=0"], "linear.epochs: found 0, expected at least 1"),
        (["optimizer=adam"], "linear.optimizer: found 'adam', expected sgd or larc"),
        (["lrs=[-1]"], "linear.lrs: found"),
        (["held_out=61"], "linear.held_out: found 61, expected fewer than the 61 training images"),
        (["milestones=[5,2]"], "linear.milestones: found"),
        (["lr_scaling=cubic"], "linear.lr_scaling: found cubic, expected one of none, linear, sqrt"),
        (["nesterov=true", "momentum=0"], "linear.nesterov: found True, expected false without momentum"),
        (["crop_scale=[0.5]"], "linear.crop_scale: found"),
    ],
)
def test_refuses_in_one_line(tmp_path, overrides, line):
    with pytest.raises(UserError) as error:
        evaluate(SmallContext(tmp_path), "linear", *QUICK[:4], *overrides)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_refuses_images_of_other_classes(tmp_path):
    context: Context = SmallContext(tmp_path, test=images(20, classes=2))
    with pytest.raises(UserError, match="linear: found 3 classes of training and 2 of test images"):
        evaluate(context, "linear", *QUICK)


def test_the_test_view_of_a_preset_is_resized_as_published(tmp_path, monkeypatch):
    shown = []
    features = SmallContext.features
    monkeypatch.setattr(SmallContext, "features", lambda self, *given: shown.append(given[1]) or features(self, *given))
    for preset, expected in (("byol", "bicubic"), ("dino", "bicubic"), ("swav", "bilinear")):
        evaluate(SmallContext(tmp_path), "linear", f"preset={preset}", "batch_size=16", "epochs=1", "held_out=5")
        assert [data.eval_interpolation for data in shown[-2:]] == [expected] * 2


def test_trains_on_all_images_whatever_the_run_left_out(tmp_path):
    context = SmallContext(tmp_path / "a")
    context.data = dataclasses.replace(context.data, imbalance="linear")
    assert evaluate(context, "linear", *QUICK).sweep == evaluate(SmallContext(tmp_path / "b"), "linear", *QUICK).sweep


def test_warns_of_milestones_after_the_end(tmp_path, caplog):
    evaluate(SmallContext(tmp_path), "linear", "preset=moco", "batch_size=16", "epochs=1")
    assert "linear.milestones: found [60, 80] in 1 epochs" in caplog.text
