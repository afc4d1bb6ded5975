"""Sources by their text: runs, files of released layouts, folders, and the lines for what can't be one."""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from caco_fast.config import load_config, to_yaml
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, build_backbone
from caco_fast.models.weights import initialise
from caco_fast.pretrained import open_source
from caco_fast.pretrained.places import resolved_init

State = dict[str, Tensor]
OPTIONS = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 8]}
NARROW = BackboneConfig("resnet18", options=OPTIONS)
FC = {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
MLP2 = {f"fc.{i}.{kind}": torch.zeros(8) for i in (0, 2) for kind in ("weight", "bias")}
MLP3 = {f"fc.{i}.weight": torch.zeros(8) for i in (0, 1, 3, 4, 6)}
QUEUE = {"module.queue": torch.zeros(4, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
BANK = {"Memory_Bank": {"W": torch.zeros(4, 4), "v": torch.zeros(4, 4)}}
OPTIMIZER = {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}}


@pytest.fixture(scope="module")
def trained() -> State:
    """Weights of a narrow ResNet-18, none of them at their initial value."""
    torch.manual_seed(1)
    made = build_backbone(NARROW, channels=3).state_dict()
    return {key: value + 3 if value.dtype == torch.int64 else torch.randn_like(value) for key, value in made.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    """A second encoder, twice the first."""
    return {key: value * 2 for key, value in state.items()}


def beside(prefix: str, *names: str) -> State:
    return {prefix + name: torch.zeros(2) for name in names}


# Framework: the tree of its released files, and the prefix of their second encoder, if they have one.
RELEASED: dict[str, tuple[Callable[[State], Any], str]] = {
    "CaCo": (
        lambda s: (
            {"epoch": 3, "arch": "resnet50", "best_acc": 0.0, "knn_acc": 0.0, **OPTIMIZER, **BANK}
            | {"state_dict": under("module.encoder_q.", s | MLP3) | under("module.encoder_k.", other(s | MLP3))}
        ),
        "module.encoder_k.",
    ),
    "AdCo": (
        lambda s: (
            {"epoch": 3, "arch": "resnet50", "best_acc": 0.0, **OPTIMIZER, **BANK}
            | {"state_dict": under("module.encoder_q.", s | MLP2) | under("module.encoder_k.", other(s | MLP2))}
        ),
        "module.encoder_k.",
    ),
    "MoCo v1": (
        lambda s: (
            {"epoch": 3, "arch": "resnet50", **OPTIMIZER}
            | {"state_dict": under("module.encoder_q.", s | FC) | under("module.encoder_k.", other(s | FC)) | QUEUE}
        ),
        "module.encoder_k.",
    ),
    "MoCo v2": (
        lambda s: (
            {"epoch": 3, "arch": "resnet50", **OPTIMIZER}
            | {"state_dict": under("module.encoder_q.", s | MLP2) | under("module.encoder_k.", other(s | MLP2)) | QUEUE}
        ),
        "module.encoder_k.",
    ),
    "MoCo v3": (
        lambda s: (
            {"epoch": 3, "arch": "resnet50", **OPTIMIZER}
            | {
                "state_dict": under("module.momentum_encoder.", other(s | MLP3))
                | under("module.base_encoder.", s | MLP3)
                | beside("module.predictor.", "0.weight")
            }
        ),
        "module.momentum_encoder.",
    ),
    "SimSiam": (
        lambda s: {"state_dict": under("module.encoder.", s | MLP3) | beside("module.predictor.", "0.weight")},
        "",
    ),
    "InfoMin, InsDis or PIRL": (
        lambda s: {"epoch": 3, "model": under("module.encoder.", s) | beside("module.head.", "0.weight")},
        "",
    ),
    "SimCLR (converted from Google's)": (lambda s: {"state_dict": s | FC}, ""),
    "SimCLR (sthalles)": (lambda s: {"epoch": 3, "state_dict": under("backbone.", s | MLP2), **OPTIMIZER}, ""),
    "SwAV or DeepCluster v2": (
        lambda s: under("module.", s | beside("", "projection_head.0.weight", "prototypes.weight")),
        "",
    ),
    "Barlow Twins": (
        lambda s: {"model": under("module.backbone.", s) | beside("module.", "projector.0.weight", "bn.running_mean")},
        "",
    ),
    "VICReg": (lambda s: {"model": under("module.backbone.", s) | beside("module.projector.", "0.weight")}, ""),
    "DINO": (
        lambda s: {
            "student": under("module.backbone.", other(s)) | beside("module.head.", "last_layer.weight"),
            "teacher": under("backbone.", s) | beside("head.", "last_layer.weight"),
            "epoch": 3,
        },
        "module.backbone.",
    ),
    "solo-learn": (
        lambda s: {
            "state_dict": under("backbone.", s)
            | under("momentum_backbone.", other(s))
            | beside("", "classifier.weight", "projector.0.weight"),
            "pytorch-lightning_version": "2",
        },
        "momentum_backbone.",
    ),
    "lightly": (
        lambda s: {
            "state_dict": under("backbone.", s)
            | under("backbone_momentum.", other(s))
            | beside("projection_head.", "layers.0.weight"),
        },
        "backbone_momentum.",
    ),
    "mmselfsup": (
        lambda s: {
            "meta": {"epoch": 3},
            "state_dict": under("encoder_q.0.", s) | under("encoder_k.0.", other(s)) | QUEUE,
        },
        "encoder_k.0.",
    ),
    "VISSL": (
        lambda s: {
            "classy_state_dict": {
                "base_model": {"model": {"trunk": under("_feature_blocks.", s), "heads": beside("0.", "clf.weight")}}
            }
        },
        "",
    ),
    "names of torchvision": (lambda s: s | FC, ""),
}


def equal(found: torch.nn.Module, state: State) -> bool:
    made = found.state_dict()
    return made.keys() == state.keys() and all(torch.equal(made[key], state[key]) for key in state)


@pytest.mark.parametrize("framework", RELEASED)
def test_released_layouts_are_read_and_named(tmp_path: Path, trained: State, framework: str) -> None:
    tree, second = RELEASED[framework]
    torch.save(tree(trained), tmp_path / "w.pth.tar")
    found = open_source(str(tmp_path / "w.pth.tar"), NARROW)
    assert equal(found.backbone, trained) and not found.backbone.training
    assert found.origin["framework"] == framework and found.origin["tensors"] == len(trained)
    assert found.title == "w" and found.channels == 3
    if not second:
        with pytest.raises(UserError, match=r"expected a key encoder; leave out @key"):
            open_source(f"{tmp_path / 'w.pth.tar'}@key", NARROW)
        return
    choice = "student" if framework == "DINO" else "key"
    found = open_source(f"{tmp_path / 'w.pth.tar'}@{choice}", NARROW)
    assert equal(found.backbone, other(trained)) and found.origin["prefix"] == second
    assert found.title == f"w-{choice}" and found.origin["framework"] == framework


@pytest.mark.parametrize("framework", RELEASED)
def test_a_wrong_prefix_or_count_is_one_line(tmp_path: Path, trained: State, framework: str) -> None:
    tree, _ = RELEASED[framework]
    missing = {key: value for key, value in trained.items() if key != "layer3.0.bn1.running_var"}
    torch.save(tree(missing), tmp_path / "missing.pth")
    with pytest.raises(UserError, match=r"^source: \S+ under '[\w.]*' 1 are missing, such as layer3\.0\.bn1\.run") as e:
        open_source(str(tmp_path / "missing.pth"), NARROW)
    assert "\n" not in str(e.value)
    torch.save(tree(trained), tmp_path / "w.pth")
    deeper = BackboneConfig("resnet18", options=OPTIONS | {"layers": [1, 1, 2, 1]})
    with pytest.raises(UserError, match="are missing, such as layer3.1.conv1.weight.* set backbone.name, stem and opt"):
        open_source(str(tmp_path / "w.pth"), deeper)
    with pytest.raises(UserError, match="^source: .*expected"):
        open_source(f"{tmp_path / 'w.pth'}@prefix=module.nothing.", NARROW)


def test_a_prefix_that_nobody_knows_is_taken_if_it_is_the_only_one(tmp_path: Path, trained: State) -> None:
    torch.save({"model": under("net.trunk.", trained)}, tmp_path / "one.pt")
    found = open_source(str(tmp_path / "one.pt"), NARROW)
    assert equal(found.backbone, trained) and found.origin["framework"] == ""
    torch.save({"model": under("net.a.", trained) | under("net.b.", other(trained))}, tmp_path / "two.pt")
    line = r"found 2 encoders of this architecture, under 'net\.a\.', 'net\.b\.', expected one; choose it by @prefix="
    with pytest.raises(UserError, match=line):
        open_source(str(tmp_path / "two.pt"), NARROW)
    assert equal(open_source(f"{tmp_path / 'two.pt'}@prefix=net.b.", NARROW).backbone, other(trained))


def test_the_pixels_of_simclr_are_not_normalised_and_best_of_caco_is_the_latest(tmp_path: Path, trained: State) -> None:
    torch.save({"state_dict": trained | FC}, tmp_path / "resnet50-1x.pth")
    found = open_source(str(tmp_path / "resnet50-1x.pth"), NARROW)
    assert found.mean == (0.0, 0.0, 0.0) and found.std == (1.0, 1.0, 1.0) and "SimCLR" in found.origin["notes"][0]
    torch.save(RELEASED["CaCo"][0](trained), tmp_path / "checkpoint_best.pth.tar")
    found = open_source(str(tmp_path / "checkpoint_best.pth.tar"), NARROW)
    assert found.mean is None and "latest epoch" in found.origin["notes"][0]


def test_the_architecture_is_that_of_the_file_unless_another_is_given(tmp_path: Path) -> None:
    model = build_backbone(BackboneConfig("resnet18"), channels=1)
    torch.save({"arch": "resnet18", "state_dict": under("module.encoder_q.", model.state_dict())}, tmp_path / "w.pth")
    found = open_source(str(tmp_path / "w.pth"))
    assert found.architecture.name == "resnet18" and found.channels == 1
    with pytest.raises(UserError, match="expected 216 tensors"):
        open_source(str(tmp_path / "w.pth"), BackboneConfig("resnet34"))


def test_the_small_vit_of_moco_v3_has_its_twelve_heads(tmp_path: Path) -> None:
    small = timm.create_model("vit_small_patch16_224", num_classes=0)
    torch.save({"arch": "vit_small", "state_dict": under("module.base_encoder.", small.state_dict())}, tmp_path / "w")
    assert open_source(str(tmp_path / "w")).backbone.blocks[0].attn.num_heads == 12


def test_pickled_classes_are_refused_by_name_and_read_with_trust(tmp_path: Path, trained: State) -> None:
    arguments = argparse.Namespace(arch="resnet18", lr=1)
    torch.save({"teacher": under("backbone.", trained), "args": arguments}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"^source: .* holds a argparse\.Namespace, whose .* or load it with --trust$"):
        open_source(str(tmp_path / "dino.pth"), NARROW)
    assert equal(open_source(str(tmp_path / "dino.pth"), NARROW, trust=True).backbone, trained)


def test_byols_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pretrain_res50x1.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"res50x1\.pkl is a pickle, as BYOL \(haiku\) and detectron2 release"):
        open_source(str(tmp_path / "pretrain_res50x1.pkl"))


@pytest.mark.parametrize("cut", [0, 200, 0.6])
def test_a_truncated_file_is_one_line(tmp_path: Path, trained: State, cut: float) -> None:
    for name, write in (("w.pth", torch.save), ("w.safetensors", save_file)):
        write(trained, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(cut if cut > 1 else cut * len(whole))])
        with pytest.raises(UserError, match=f"^source: {re.escape(str(tmp_path / name))} is truncated") as error:
            open_source(str(tmp_path / name), NARROW)
        assert "\n" not in str(error.value)


def test_a_folder_of_timm_is_read_with_its_pixels(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=0, in_chans=1, layers=[1, 1, 1, 1])
    config = {"mean": [0.5], "std": [0.25]}
    held = {"architecture": "resnet18", "model_args": {"layers": [1, 1, 1, 1]}, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(held))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = open_source(str(tmp_path))
    assert equal(found.backbone, model.state_dict())
    assert (found.mean, found.std, found.channels, found.title) == ((0.5,), (0.25,), 1, tmp_path.name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", "architectures": ["ResNetModel"]}))
    with pytest.raises(UserError, match=r"config\.json without `architecture` \(model type resnet\)"):
        open_source(str(tmp_path))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints, whose weights are those of the step."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    options = "backbone.options={layers: [1, 1, 1, 1], channels: [4, 4, 4, 8]}"
    config = load_config(None, ["backbone.name=resnet18", options, "data.mean=[0.1]", "data.std=[0.2]"])
    backbone = build_backbone(config.backbone, channels=1)
    store = CheckpointStore(folder / "checkpoints")
    for step in (4, 5):
        torch.nn.init.constant_(backbone.conv1.weight, step)
        encoders = under("query.backbone.", backbone.state_dict()) | under(
            "key.backbone.", other(backbone.state_dict())
        )
        state = {"config": to_yaml(config), "encoders": encoders, "position": {"total_steps": step}}
        path = store.save(state, step)
        store.save_best(path, step, -step)
    store.save_milestone(path, 7)
    return folder


@pytest.mark.parametrize("choice, step", [("", 5), ("@best", 4), ("@step=4", 4), ("@epoch=7", 5), ("@key", 10)])
def test_a_checkpoint_of_a_run_is_chosen(run: Path, choice: str, step: int) -> None:
    found = open_source(f"{run}{choice}")
    assert found.backbone.conv1.weight.unique().tolist() == [step]
    assert (found.mean, found.std, found.channels) == ((0.1,), (0.2,), 1) and found.config.method == "caco"
    # The folder's figures are those of its last checkpoint.
    assert found.folder == (run if choice == "" else None)
    assert found.title == "a" + choice.replace("@", "-").replace("=", "-")
    # `backbone.init` reads the same.
    backbone = build_backbone(found.architecture, channels=1)
    initialise(backbone, resolved_init(f"{run}{choice}"), "resnet18", 1, {})
    assert equal(backbone, found.backbone.state_dict())


def test_a_checkpoint_of_ours_anywhere_is_a_source(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "checkpoints" / "best.pt", tmp_path / "mine.pt")
    found = open_source(str(tmp_path / "mine.pt"))
    assert found.origin["kind"] == "checkpoint" and found.origin["step"] == 4 and found.title == "mine"
    assert found.config.data.mean == [0.1] and found.folder is None
    assert open_source(str(run / "checkpoints" / "best.pt")).title == "a-best"


@pytest.mark.parametrize(
    "text, line",
    [
        ("{run}@step=6", r"found @step=6 for the run .*, but it has @step=4, @step=5, @best, @epoch=7"),
        ("{run}@best@step=4", "expected one checkpoint and one encoder"),
        ("{run}/checkpoints/best.pt@best", "found @best behind .*expected that behind a run folder"),
        ("{run}/checkpoints", "found a folder without checkpoints/ or config.json, expected a run folder"),
        ("{run}/none.pt", r"none\.pt', which doesn't exist, expected a run folder"),
        ("random:resnetx", "timm knows no architecture 'resnetx'; nearest"),
        ("torchvision:resnet18.V7", r"expected resnet18 alone or with \.IMAGENET1K_V1"),
    ],
)
def test_what_is_no_source_is_one_line(run: Path, text: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        open_source(text.format(run=run))
    assert "\n" not in str(error.value)


def test_init_of_a_folder_or_of_a_choice(run: Path, tmp_path: Path, trained: State) -> None:
    torch.save({"state_dict": under("encoder_q.", trained) | under("encoder_k.", other(trained))}, tmp_path / "w.pth")
    backbone = build_backbone(NARROW, channels=3)
    initialise(backbone, resolved_init(f"{tmp_path / 'w.pth'}@key"), "resnet18", 3, OPTIONS)
    assert equal(backbone, other(trained))
    (tmp_path / "hub").mkdir()
    save_file(trained, tmp_path / "hub" / "model.safetensors")
    initialise(backbone, resolved_init(str(tmp_path / "hub")), "resnet18", 3, OPTIONS)
    assert equal(backbone, trained)
    with pytest.raises(UserError, match="^backbone.init: found @step=6 for the run"):
        resolved_init(f"{run}@step=6")
    with pytest.raises(
        UserError, match="^backbone.init: found @best behind .*w.pth, expected that behind a run folder"
    ):
        initialise(backbone, f"{tmp_path / 'w.pth'}@best", "resnet18", 3, OPTIONS)


def test_pretrained_weights_by_name_come_from_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        held = timm.create_model("resnet18", num_classes=0)
        held.conv1.weight.fill_(3)
    create = timm.create_model
    fetch = lambda name, pretrained=False, **options: held if pretrained else create(name, **options)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", fetch)
    found = open_source("timm:resnet18.a1_in1k")
    assert equal(found.backbone, held.state_dict()) and found.title == "timm-resnet18.a1_in1k"
    assert found.mean == (0.485, 0.456, 0.406)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: held.state_dict() | FC)
    found = open_source("torchvision:resnet18.IMAGENET1K_V1")
    assert equal(found.backbone, held.state_dict()) and found.mean is None


def test_the_hash_of_the_weights_sees_names_shapes_dtypes_and_every_byte() -> None:
    first, second = open_source("random:resnet18", NARROW), open_source("random:resnet18", NARROW)
    assert first.weights_sha256 == second.weights_sha256
    for change in (
        lambda model: model.bn1.running_var[3].add_(1e-6),
        lambda model: model.bn1.num_batches_tracked.add_(1),
        lambda model: setattr(model, "bn1", type(model.bn1)(64, affine=False)),
        lambda model: model.bfloat16(),
    ):
        changed = open_source("random:resnet18", NARROW)
        with torch.no_grad():
            change(changed.backbone)
        assert changed.weights_sha256 != first.weights_sha256
