"""Exports: every format is read back by its library or by its rule of names, and what can't be held is refused."""

import json
import pickle
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from caco_fast.cli import main as program
from caco_fast.cli.export import NAMES
from caco_fast.config import load_config, to_yaml
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.errors import UserError
from caco_fast.export import FORMATS, base, export
from caco_fast.export.detection import detectron2_name, torchvision_name
from caco_fast.models import BackboneConfig, build_backbone
from caco_fast.pretrained import Pretrained, open_source

OUT = {
    "torchvision": "r.pth",
    "timm": "r.safetensors",
    "hub": "hub",
    "safetensors": "s.safetensors",
    "detectron2": "detectron2",
    "mmdet": "m.pth",
    "lightly": "l.ckpt",
    "onnx": "r.onnx",
}
SMALL = BackboneConfig("resnet18", "small", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 8]})


def shaken(module: nn.Module) -> nn.Module:
    """A module with nothing at its initial value."""
    torch.manual_seed(2)
    with torch.no_grad():
        for value in module.state_dict().values():
            value.add_(torch.rand(value.shape) * 0.1 if value.is_floating_point() else 3)
    return module


@pytest.fixture(scope="module")
def resnet() -> Pretrained:
    source = open_source("random:resnet18")
    shaken(source.backbone)
    return source


@pytest.fixture(scope="module")
def exported(resnet: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name in set(OUT) - {"onnx"}:
        assert export(resnet, name, folder / OUT[name]).difference < 1e-5
    return folder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def features(resnet: Pretrained, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return resnet.backbone(images)


def test_the_command_knows_every_format() -> None:
    assert set(NAMES) == set(FORMATS) == {*OUT, "bank"}


def test_torchvision_lacks_its_classifier_alone(exported: Path, resnet: Pretrained, images: torch.Tensor) -> None:
    model = torchvision.models.resnet18()
    keys = model.load_state_dict(torch.load(exported / "r.pth", weights_only=True), strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys
    model.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), features(resnet, images))


def test_timm_reads_the_file_and_the_folder(exported: Path, resnet: Pretrained, images: torch.Tensor) -> None:
    hub = f"local-dir:{exported / 'hub'}"
    for model in (
        timm.create_model("resnet18", num_classes=0, checkpoint_path=str(exported / "r.safetensors")),
        timm.create_model(hub, pretrained=True, num_classes=0),
        timm.create_model(hub, pretrained=True, num_classes=10).reset_classifier(0)
        or timm.create_model(hub, pretrained=True),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(images), features(resnet, images))
    held = timm.create_model(hub, pretrained=True, num_classes=0).pretrained_cfg
    assert (held["interpolation"], held["crop_pct"]) == ("bilinear", 0.875)
    assert not held.get("paper_ids") and not held.get("origin_url") and not held.get("license")
    card = (exported / "hub" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "timm" and "Not measured." in card


def test_our_own_reader_reads_every_export(exported: Path, resnet: Pretrained) -> None:
    for name in set(OUT) - {"onnx", "detectron2"}:
        found = open_source(str(exported / OUT[name]), BackboneConfig("resnet18"))
        assert found.weights_sha256 == resnet.weights_sha256, name
    # These two say their architecture themselves.
    for name in ("hub", "safetensors"):
        assert open_source(str(exported / OUT[name])).architecture.name == "resnet18"


def test_detectron2_has_its_names_and_settings(exported: Path, resnet: Pretrained) -> None:
    folder = exported / "detectron2"
    held = pickle.loads((folder / "model.pkl").read_bytes())
    assert held["matching_heuristics"] is True and held["__author__"] == "caco_fast"
    expected = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.0.conv2.norm.bias": "layer1.0.bn2.bias",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res5.0.shortcut.norm.weight": "layer4.0.downsample.1.weight",
    }
    state = resnet.backbone.state_dict()
    for theirs, ours in expected.items():
        assert (held["model"][theirs] == state[ours].numpy()).all()
    assert len(held["model"]) == sum(not key.endswith("num_batches_tracked") for key in state)
    for name, classes in (("pascal_voc_R_18_C4_24k.yaml", 20), ("coco_R_18_C4_2x.yaml", None)):
        settings = yaml.safe_load((folder / name).read_text())
        assert settings["MODEL"]["RESNETS"]["NORM"] == "SyncBN" and settings["MODEL"]["WEIGHTS"] == "model.pkl"
        assert settings["MODEL"]["ROI_HEADS"].get("NUM_CLASSES") == classes
        assert settings["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53] and settings["INPUT"]["FORMAT"] == "RGB"


def test_the_names_of_a_bottleneck_go_there_and_back() -> None:
    with torch.device("meta"):
        names = list(torchvision.models.resnet50().state_dict())[:-2]
    assert [torchvision_name(detectron2_name(name)) for name in names] == names
    assert len({detectron2_name(name) for name in names}) == len(names)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a small encoder of grey images, with a bank."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    options = "backbone.options={layers: [1, 1, 1, 1], channels: [4, 4, 4, 8]}"
    settings = ["backbone.name=resnet18", options, "data.source=embedded", "views=[{size: 28, count: 2}]"]
    config = load_config(None, [*settings, "data.eval_resize=32", "data.eval_size=28"])
    backbone = shaken(build_backbone(config.backbone, channels=1))
    state = {
        "config": to_yaml(config),
        "encoders": {f"query.backbone.{key}": value for key, value in backbone.state_dict().items()},
        "method": {"criterion.bank.bank": 3 * torch.randn(11, 4), "criterion.bank.velocity": torch.zeros(11, 4)},
        "position": {"total_steps": 7},
    }
    CheckpointStore(folder / "checkpoints").save(state, 7)
    (folder / "summary.json").write_text(json.dumps({"knn_trained": 77.15, "steps": 7}))
    return folder


def test_onnx_takes_any_number_of_images(run: Path, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    source = open_source(str(run))
    assert export(source, "onnx", tmp_path / "r.onnx").difference < 1e-5
    model = onnx.load(tmp_path / "r.onnx")
    assert model.opset_import[0].version >= 18 and len(list(tmp_path.iterdir())) == 1
    session = onnxruntime.InferenceSession(tmp_path / "r.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = torch.randn(count, 1, 28, 28)
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), features(source, images), rtol=1e-4, atol=1e-4)


def test_a_folder_of_a_run_has_its_figures_recipe_and_pixels(run: Path, tmp_path: Path) -> None:
    export(open_source(str(run)), "hub", tmp_path / "hub")
    held = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert held["model_args"]["channels"] == [4, 4, 4, 8] and held["num_features"] == 8
    pixels = held["pretrained_cfg"]
    assert (pixels["mean"], pixels["std"], pixels["input_size"], pixels["crop_pct"]) == (
        [0.2860], [0.3530], [1, 28, 28], 0.875,
    )  # fmt: skip
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| kNN of the run's monitor | 77.15 % |" in card and "caco, 200 epochs" in card and str(run) not in card
    # The architecture, the pixels and the channels come back.
    again = open_source(str(tmp_path / "hub"))
    assert again.mean == (0.2860,) and again.weights_sha256 == open_source(str(run)).weights_sha256


def test_safetensors_say_where_they_come_from(run: Path, tmp_path: Path) -> None:
    source = open_source(str(run))
    export(source, "safetensors", tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "7" and metadata["source_sha256"] == source.origin["sha256"]
    assert yaml.safe_load(metadata["config"])["method"] == "caco"
    # Others may read it, as any file that they are given.
    assert (tmp_path / "w.safetensors").stat().st_mode & stat.S_IRGRP


def test_the_bank_is_unit_rows_of_a_run_or_of_a_released_file(run: Path, tmp_path: Path) -> None:
    export(open_source(str(run)), "bank", tmp_path / "b.safetensors")
    rows = load_file(tmp_path / "b.safetensors")["bank"]
    held = torch.load(run / "checkpoints" / "step_00000007.pt", weights_only=True)["state"]["method"]
    torch.testing.assert_close(rows, nn.functional.normalize(held["criterion.bank.bank"], dim=1))
    assert rows.shape == (11, 4)
    backbone = build_backbone(BackboneConfig("resnet18"), channels=3).state_dict()
    bank = {"W": torch.randn(4, 11), "v": torch.zeros(4, 11)}
    encoder = {f"module.encoder_q.{key}": value for key, value in backbone.items()}
    torch.save({"arch": "resnet18", "state_dict": encoder, "Memory_Bank": bank}, tmp_path / "caco.pth.tar")
    export(open_source(str(tmp_path / "caco.pth.tar")), "bank", tmp_path / "c.safetensors")
    rows = load_file(tmp_path / "c.safetensors")["bank"]
    torch.testing.assert_close(rows, nn.functional.normalize(bank["W"], dim=0).T)
    with pytest.raises(UserError, match=r"^bank: random-resnet18 has no bank"):
        export(open_source("random:resnet18"), "bank", tmp_path / "d.safetensors")


@pytest.mark.parametrize("name", ["torchvision", "timm", "hub", "detectron2", "mmdet"])
def test_a_small_stem_is_refused_with_what_to_take(name: str, tmp_path: Path) -> None:
    small = open_source("random:resnet18", replace(SMALL, options={}))
    with pytest.raises(UserError, match=f"^{name}: can't hold the stem 'small'.*take safetensors, lightly or onnx"):
        export(small, name, tmp_path / OUT[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source, name, line",
    [
        ("convnext_atto", "torchvision", "torchvision has no convnext_atto"),
        ("convnext_atto", "detectron2", "found convnext_atto, expected one of resnet18"),
        ("vit_tiny_patch16_224", "mmdet", "expected one of resnet18"),
        ("small_alexnet", "hub", "timm alone has no small_alexnet"),
        ("densenet121", "mmdet", "expected one of resnet18"),
    ],
)
def test_other_architectures_are_refused(source: str, name: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line) as error:
        export(open_source(f"random:{source}"), name, tmp_path / OUT[name])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_grey_images_do_not_go_into_torchvision(run: Path, tmp_path: Path) -> None:
    source = open_source("random:resnet18")
    grey = replace(source, backbone=build_backbone(BackboneConfig("resnet18"), 1).eval(), channels=1)
    with pytest.raises(UserError, match=r"conv1\.weight \(found \[64, 1, 7, 7\], expected \[64, 3, 7, 7\]\)"):
        export(grey, "torchvision", tmp_path / "r.pth")
    with pytest.raises(UserError, match="mean and std of the 1 channels are not known"):
        export(grey, "hub", tmp_path / "hub")


@pytest.mark.parametrize("name, fault", [("lightly", 1e-3), ("timm", float("nan"))])
def test_a_difference_is_an_error_and_leaves_no_file(
    name: str, fault: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("random:resnet18", BackboneConfig("resnet18", options={"layers": [1, 1, 1, 1]}))
    kind = FORMATS[name]

    def write(pretrained: Pretrained, path: Path) -> None:
        bent = open_source("random:resnet18", pretrained.architecture)
        with torch.no_grad():
            bent.backbone.conv1.weight.mul_(1 + fault)
        kind.write(bent, path)

    monkeypatch.setitem(base.FORMATS, name, replace(kind, write=write))
    out = tmp_path / OUT[name]
    with pytest.raises(UserError, match=rf"^{name}: what was read back from .* differs by .*nothing was written"):
        export(source, name, out)
    assert not list(tmp_path.iterdir())
    out.write_text("before")
    with pytest.raises(UserError, match="differs"):
        export(source, name, out, force=True)
    assert out.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_what_exists_is_replaced_only_if_asked(run: Path, tmp_path: Path) -> None:
    source = open_source(str(run))
    export(source, "hub", tmp_path / "hub")
    with pytest.raises(UserError, match=r"^OUT: .*hub exists; take another name, or replace it with --force"):
        export(source, "hub", tmp_path / "hub")
    (tmp_path / "hub" / "extra").write_text("")
    export(source, "hub", tmp_path / "hub", force=True)
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for name in ("hub", "lightly"):
        out = tmp_path / ("mine" if name == "hub" else "mine.ckpt")
        if name == "lightly":
            (tmp_path / "mine").rename(out)
        with pytest.raises(UserError, match="is a folder that .* did not write, and --force does not remove it"):
            export(source, name, out, force=True)
        assert (out / "thesis.tex").exists()
    with pytest.raises(UserError, match=r"expected a name that ends with \.onnx for onnx"):
        export(source, "onnx", tmp_path / "model.pth")
    with pytest.raises(UserError, match="^FORMAT: found 'tf', expected one of"):
        export(source, "tf", tmp_path / "x")


def test_the_command_writes_and_says_so_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert program(["export", str(run), "lightly", str(tmp_path / "l.ckpt")]) == 0
    assert "lightly: written to" in capsys.readouterr().out
    assert program(["export", str(run), "lightly", str(tmp_path / "l.ckpt")]) == 2
    assert capsys.readouterr().err.startswith("error: OUT: ")
    torch.save(build_backbone(SMALL, channels=3).state_dict(), tmp_path / "small.pth")
    settings = ["backbone.name=resnet18", "backbone.stem=small", f"backbone.options={json.dumps(SMALL.options)}"]
    assert program(["export", str(tmp_path / "small.pth"), "lightly", str(tmp_path / "s.pth"), *settings]) == 0
    assert program(["export", str(tmp_path / "small.pth"), "nix", str(tmp_path / "s.onnx")]) == 2
    assert program(["export", str(run), "lightly", str(tmp_path / "m.ckpt"), "backbone.nme=a"]) == 2
    assert "backbone.name" in capsys.readouterr().err
