"""Fine-tuning against a loop written by hand, its grid, its stops and the choice of the labelled images."""

import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from caco_fast.data import ViewConfig, build_train_loader
from caco_fast.engine.ranks import Interrupted
from caco_fast.errors import UserError
from caco_fast.protocols.few_labels import labelled_part
from caco_fast.protocols.fine_tuning import FineTuning
from tests.protocols.small import SmallContext, evaluate, images

QUICK = ("preset=swav", "batch_size=16", "epochs=3", "milestones=[1]", "lr=0.05", "head_lr=0.4")


def test_equals_a_loop_written_by_hand_to_the_bit(tmp_path, monkeypatch):
    context = SmallContext(tmp_path, seed=2)
    made = []
    monkeypatch.setattr(FineTuning, "result", lambda self: made.append(self) or result(self))
    evaluate(context, "finetune", *QUICK)

    view = ViewConfig(size=12, scale=(0.08, 1.0), jitter_p=0.0, grey_p=0.0, blur_p=0.0)
    loader = build_train_loader(context.data, [view], batch_size=16, seed=2, source=context.sources["train"])
    backbone, head = copy.deepcopy(context.backbone).requires_grad_(), nn.Linear(10, 3)
    head.weight.data = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)) * 0.01
    nn.init.zeros_(head.bias)
    model = nn.Sequential(backbone, head).train()
    optimizer = torch.optim.SGD(
        [{"params": backbone.parameters(), "lr": 0.05}, {"params": head.parameters(), "lr": 0.4}], 0.1, momentum=0.9
    )
    labels = torch.from_numpy(context.sources["train"].labels)
    for epoch in range(3):
        if epoch == 1:
            for group in optimizer.param_groups:
                group["lr"] *= 0.2
        for batch in loader.batches(epoch):
            loss = F.cross_entropy(
                model(batch.views[0].contiguous(memory_format=torch.channels_last)), labels[batch.index]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(made[0].model.state_dict()[name], value, rtol=0, atol=0)
    model.eval()
    pixels = torch.from_numpy(context.sources["test"].images).permute(0, 3, 1, 2) / 255
    answers = model((pixels - 0.4) / 0.3).argmax(1)
    correct = (answers == torch.from_numpy(context.sources["test"].labels)).double().mean()
    assert result(made[0]).metrics["top1"] == pytest.approx(100 * correct.item())


result = FineTuning.result


def test_the_pre_trained_backbone_stays_as_it_is(tmp_path):
    context = SmallContext(tmp_path)
    before = copy.deepcopy(context.backbone.state_dict())
    evaluate(context, "finetune", *QUICK)
    assert all(torch.equal(value, before[name]) for name, value in context.backbone.state_dict().items())


def test_every_pair_of_a_grid_starts_from_the_same_weights(tmp_path):
    grid = evaluate(SmallContext(tmp_path), "finetune", *QUICK, "grid=[[0.01,1],[0.05,0.4],[1e30,1]]")
    assert [(row["lr"], row["head_lr"]) for row in grid.sweep] == [(0.05, 0.4), (0.01, 1.0), (1e30, 1.0)]
    alone = evaluate(SmallContext(tmp_path), "finetune", *QUICK[:-2], "lr=0.01", "head_lr=1")
    assert grid.sweep[1] == alone.sweep[0]
    assert grid.sweep[2]["loss"] is None and grid.sweep[2]["epochs"] == 1
    assert grid.metrics["top1"] == grid.sweep[0]["top1"]
    assert grid.metrics["top1_published_rule"] == max(row["best"] for row in grid.sweep)


@pytest.mark.parametrize("steps", [1, 3, 11])
def test_a_stopped_run_continues_to_the_same_result(tmp_path, monkeypatch, steps):
    settings = (*QUICK, "grid=[[0.01,1]]")
    whole = evaluate(SmallContext(tmp_path / "a"), "finetune", *settings)
    step, done = FineTuning._step, []

    def step_then_signal(self, *arguments):
        step(self, *arguments)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FineTuning, "_step", step_then_signal)
    with pytest.raises(Interrupted, match="finetune: stopped by SIGTERM in epoch . of pair"):
        evaluate(SmallContext(tmp_path / "b"), "finetune", *settings)
    assert evaluate(SmallContext(tmp_path / "b"), "finetune", *settings) == whole
    assert len(done) == 18


@pytest.mark.parametrize("preset", ["simclr", "simclrv2", "swav", "barlow", "vicreg", "mmselfsup", "lightly"])
def test_every_preset_trains(tmp_path, preset):
    found = evaluate(
        SmallContext(tmp_path),
        "lowshot",
        f"preset={preset}",
        "per_class=6",
        "batch_size=16",
        "epochs=1",
        "milestones=[]",
    )
    assert found.counts["images"]["labelled"]["found"] == 18
    assert len(found.sweep) == (9 if preset == "mmselfsup" else 1)
    assert "top1_frozen_logistic_regression" in found.metrics


def test_the_preset_is_that_of_the_share(tmp_path):
    for share, lr in ((0.1, 0.01), (0.02, 0.02)):
        context = SmallContext(tmp_path, images(300))
        found = evaluate(context, "lowshot", "preset=swav", f"share={share}", "batch_size=4", "epochs=1")
        assert found.sweep[0]["lr"] == lr and found.counts["images"]["labelled"]["found"] == 300 * share


def test_draws_the_same_images_for_a_seed_and_more_for_more():
    source = images(61)
    chosen = dict(file="", share=None, name="lowshot")
    few, many, other = (labelled_part(source, per_class=n, seed=seed, **chosen) for n, seed in ((2, 0), (5, 0), (2, 1)))
    assert [(few.labels == label).sum() for label in range(3)] == [2, 2, 2]
    pixels = {image.tobytes() for image in many.images}
    assert {image.tobytes() for image in few.images} < pixels and len(pixels) == 15
    assert {image.tobytes() for image in few.images} != {image.tobytes() for image in other.images}
    part = labelled_part(source, per_class=None, seed=0, **chosen | {"share": 0.1})
    assert len(part) == 6


def test_takes_the_images_of_a_list(tmp_path):
    source, file = images(61), tmp_path / "list.txt"
    names = [source.name(position) for position in (3, 7, 8)]
    file.write_text("\n".join(names[::-1]) + "\n\n")
    part = labelled_part(source, file=str(file), per_class=None, share=None, seed=0, name="lowshot")
    assert [image.tobytes() for image in part.images] == [source.images[i].tobytes() for i in (3, 7, 8)]


class Files:
    """Names of files in folders of their classes."""

    names = ["/d/train/cat/1.png", "/d/train/cat/2.png", "/d/train/dog/1.png"]
    classes = ["cat", "dog"]

    def __len__(self):
        return 3

    def name(self, index):
        return self.names[index]

    def label(self, index):
        return int("dog" in self.names[index])


@pytest.mark.parametrize(
    "lines, error",
    [
        (["cat/1.png", "dog/1.png"], None),
        (["2.png", "dog/1.png"], None),
        (["1.png", "2.png"], "1 of 2 names of .* are the name of several images, such as 1.png; write CLASS/NAME"),
        (
            ["cat/1.png", "dog/7.png", "9.png"],
            "2 of 3 names of .* are not among the training images, such as dog/7.png",
        ),
        (["cat/1.png", "dog/1.png", "dog/1.png"], "has 3 names, 1 of them again; expected each once"),
        ([], "has 0 names"),
        (["cat/1.png"], r"found no labelled image of 1 of 2 classes \(dog\)"),
    ],
)
def test_names_of_a_list(tmp_path, monkeypatch, lines, error):
    file = tmp_path / "list.txt"
    file.write_text("\n".join(lines))
    monkeypatch.setattr("caco_fast.protocols.few_labels.take", lambda source, positions: positions.tolist())
    options = dict(file=str(file), per_class=None, share=None, seed=0, name="lowshot")
    if error is None:
        assert labelled_part(Files(), **options) == ([0, 2] if lines[0] == "cat/1.png" else [1, 2])
        return
    with pytest.raises(UserError, match=error) as found:
        labelled_part(Files(), **options)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "overrides, line",
    [
        (
            ["per_class=2", "share=0.1"],
            "lowshot: found per_class and share, expected one of labels, per_class and share",
        ),
        (["per_class=30"], "lowshot.per_class: found 30, expected no more than the 21 images of class class 0"),
        (["share=1.5"], "lowshot.share: found 1.5, expected a number in (0, 1]"),
        (["labels=nothing.txt"], "lowshot.labels: nothing.txt can't be read: No such file or directory"),
        (["per_class=2"], "lowshot.batch_size: found 16, expected no more than the 6 training images"),
        (["grid=[[1,2,3]]"], "lowshot.grid: found"),
        (["preset=swaw"], "lowshot.preset: found 'swaw', expected one of barlow"),
        (["optimizer=adam"], "lowshot.optimizer: found 'adam', expected sgd or lars"),
    ],
)
def test_refuses_in_one_line(tmp_path, overrides, line):
    with pytest.raises(UserError) as error:
        evaluate(SmallContext(tmp_path), "lowshot", *QUICK, *overrides)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
