"""Weights to start from: the layouts of released files, all tensors or one line, and nothing that runs code."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, ProjectorConfig, build_backbone, build_encoder_pair, weights
from caco_fast.models.weights import find_backbone, initialise, read_weights
from caco_fast.training import train
from tests.engine import tiny_run

State = dict[str, Tensor]
NARROW = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 8]}


@pytest.fixture(scope="module")
def state() -> State:
    """The weights of a narrow ResNet-18, none of them at their initial value."""
    torch.manual_seed(1)
    made = build_backbone(BackboneConfig("resnet18", options=NARROW), channels=3).state_dict()
    return {key: value + 3 if value.dtype == torch.int64 else torch.randn_like(value) for key, value in made.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


FC = {"fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}
QUEUE = {"module.queue": torch.zeros(4, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}


def with_other(state: State) -> State:
    """Weights of a second encoder, which must not be taken."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "ours": lambda s: {
        "format": "caco_fast checkpoint",
        "version": 2,
        "state": {"encoders": under("key.backbone.", with_other(s)) | under("query.backbone.", s), "position": {}},
    },
    "torchvision": lambda s: s | FC,
    "caco": lambda s: {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": under("module.encoder_k.", with_other(s)) | under("module.encoder_q.", s | FC),
        "Memory_Bank": {"W": torch.zeros(4, 4), "v": torch.zeros(4, 4)},
    },
    "moco v2": lambda s: {"state_dict": under("module.encoder_q.", s) | under("module.encoder_k.", s) | QUEUE},
    "moco v3": lambda s: {
        "state_dict": under("module.momentum_encoder.", with_other(s)) | under("module.base_encoder.", s | FC)
    },
    "simsiam": lambda s: {"state_dict": under("module.encoder.", s | FC)},
    "simclr sthalles": lambda s: {"state_dict": under("backbone.", s | FC), "optimizer": {"state": {}}},
    "swav": lambda s: under(
        "module.", s | {"projection_head.0.weight": FC["fc.weight"], "prototypes.weight": FC["fc.bias"]}
    ),
    "barlow": lambda s: {"model": under("module.backbone.", s) | {"module.projector.0.weight": FC["fc.weight"]}},
    "dino": lambda s: {
        "student": under("module.backbone.", with_other(s)),
        "teacher": under("backbone.", s) | {"head.mlp.0.weight": FC["fc.weight"]},
    },
    "vissl": lambda s: {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", s)}}}},
    "a prefix of its own": lambda s: {"state_dict": under("net.student.trunk.", s)},
    "no counters": lambda s: {key: value for key, value in s.items() if not key.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_layouts_are_read(tmp_path: Path, state: State, layout: str) -> None:
    torch.save(LAYOUTS[layout](state), tmp_path / "weights.pth")
    config = BackboneConfig("resnet18", options=NARROW, init=str(tmp_path / "weights.pth"))
    pair = build_encoder_pair(config, ProjectorConfig(hidden=16, dim=8), channels=3)
    for encoder in (pair.query, pair.key):
        for key, value in encoder.backbone.state_dict().items():
            if layout != "no counters" or not key.endswith("num_batches_tracked"):
                assert torch.equal(value, state[key]), key


def test_safetensors_are_read_and_what_is_left_out_is_said(tmp_path: Path, state: State, caplog) -> None:
    save_file(state | FC, tmp_path / "w.safetensors")
    backbone = build_backbone(BackboneConfig("resnet18", options=NARROW), channels=3)
    with caplog.at_level("INFO"):
        initialise(backbone, str(tmp_path / "w.safetensors"), "resnet18", 3, NARROW)
    assert torch.equal(backbone.layer4[0].conv2.weight, state["layer4.0.conv2.weight"])
    assert f"backbone: {len(state)} tensors of {tmp_path}/w.safetensors; left out: fc" in caplog.text


def shapes(name: str, **options: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        made = timm.create_model(name, num_classes=0, **options)
    return {key: value.shape for key, value in made.state_dict().items()}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_a_classifier_may_share_a_word_with_the_architecture(name: str) -> None:
    with torch.device("meta"):
        tree = timm.create_model(name).state_dict()
    found = find_backbone({"model": tree}, shapes(name), "x")
    assert found.state.keys() == shapes(name).keys() and found.left_out == ["head"]


@pytest.mark.parametrize("file, model", [("resnet34", "resnet18"), ("resnet18", "resnet34"), ("resnet50", "resnet18")])
def test_another_depth_is_refused(file: str, model: str) -> None:
    with torch.device("meta"):
        tree = {"state_dict": under("module.encoder_q.", torchvision.models.get_model(file).state_dict())}
    with pytest.raises(UserError, match=r"^x: under 'module\.encoder_q\.' .* such as layer1.*; expected \d+ tensors"):
        find_backbone(tree, shapes(model), "x")


def test_nothing_of_the_architecture_is_refused_with_what_is_there(state: State) -> None:
    tree = {"state_dict": {"cls_token": torch.zeros(1, 1, 4), "pos_embed": torch.zeros(1, 3, 4)}, "epoch": 3}
    line = r"^x: found 2 tensors such as cls_token \[1, 1, 4\], pos_embed .* expected \d+ tensors such as conv1\.weight"
    with pytest.raises(UserError, match=line):
        find_backbone(tree, shapes("resnet18"), "x")
    with pytest.raises(UserError, match="^x: found the keys epoch"):
        find_backbone({"epoch": 3}, shapes("resnet18"), "x")


def test_a_stem_of_another_shape_is_named(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "w.pth")
    small = build_backbone(BackboneConfig("resnet18", "small", NARROW), channels=3)
    line = r"1 differ in shape, such as conv1\.weight \(found \[64, 3, 7, 7\], expected \[64, 3, 3, 3\]\)"
    with pytest.raises(UserError, match=line):
        initialise(small, str(tmp_path / "w.pth"), "resnet18", 3, {})


@pytest.mark.parametrize("cut", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused_in_one_line(tmp_path: Path, state: State, cut: float, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut if cut >= 1 else cut * len(whole))])
    with pytest.raises(UserError, match=f"^backbone.init: {re.escape(str(path))} is truncated, damaged or no") as error:
        read_weights(str(path))
    assert "\n" not in str(error.value)


def test_a_damaged_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(10_000)}, path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="is damaged"):
        read_weights(str(path))


def test_a_pickled_class_is_refused_by_its_name(tmp_path: Path, state: State) -> None:
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds a argparse.Namespace, whose loading could run code"):
        read_weights(str(tmp_path / "w.pth"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth doesn't exist, expected a file of weights, timm or torchvision"):
        read_weights(str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="is a folder"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("init", ["timm", "torchvision"])
def test_no_network_is_one_line(monkeypatch, init: str) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route\nto host")

    backbone = build_backbone(BackboneConfig("resnet18"), channels=3)
    monkeypatch.setattr(weights.timm, "create_model", fail)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    line = rf"^backbone\.init: {init} gives no weights for resnet18 \(no route to host\); without a network .*FILE$"
    with pytest.raises(UserError, match=line):
        initialise(backbone, init, "resnet18", 3, {})


def test_torchvision_lacks_most_of_timms_architectures() -> None:
    backbone = build_backbone(BackboneConfig("convnext_atto"), channels=3)
    with pytest.raises(UserError, match=r"torchvision has no convnext_atto"):
        initialise(backbone, "torchvision", "convnext_atto", 3, {})


def test_a_run_starts_from_the_file_and_a_resumed_one_does_not_read_it(tmp_path: Path, caplog) -> None:
    images = tiny_run.write_images(tmp_path / "images", train=8, test=1)
    narrow = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "zero_init_last": False}
    file = tmp_path / "w.pth"
    torch.save(build_backbone(BackboneConfig("resnet18", "small_stride2", narrow), channels=3).state_dict(), file)
    settings = ["evaluation.every_epochs=0", f"backbone.init={file}"]
    with caplog.at_level("INFO", "caco_fast"):
        train(tiny_run.config(images, *settings, "trainer.max_steps=1"), tmp_path / "run")
    assert f"tensors of {file}" in caplog.text
    file.unlink()
    summary = train(tiny_run.config(images, *settings, "trainer.max_steps=2"), tmp_path / "run", "auto")
    assert summary["steps"] == 2
