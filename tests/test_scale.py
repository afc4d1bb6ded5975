"""Settings that follow from the images and the device, below every setting that is given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import caco_fast.scale
from caco_fast.api import _data_settings
from caco_fast.cli.train import main
from caco_fast.config import Config, settings_of
from caco_fast.configs import find_config
from caco_fast.errors import UserError
from caco_fast.scale import Facts, load_scaled


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(40):
        Image.fromarray(np.full((100 + i, 130, 3), i, np.uint8)).save(folder / f"{i}.png")
    return folder


def scaled(monkeypatch, facts: Facts, *overrides: str) -> dict:
    monkeypatch.setattr(caco_fast.scale, "_look", lambda config: facts)
    return settings_of(load_scaled("own_images", ["data.path=x", *overrides])[0])


@pytest.mark.parametrize(
    "count, ranks, gpu", [(200, 1, False), (5_000, 3, True), (100_000, 1, False), (3_000_000, 8, True)]
)
def test_what_is_chosen_fits_together(monkeypatch, count: int, ranks: int, gpu: bool) -> None:
    chosen = scaled(monkeypatch, Facts(count, 300.0, gpu, ranks))
    batch, held_out = chosen["trainer.batch_size"], chosen["evaluation.held_out"]
    assert batch % ranks == 0 and 2 * ranks <= batch <= max(2 * ranks, count / 4)
    assert chosen["caco.bank_size"] <= count / 4 and held_out * count >= 1
    steps = chosen["trainer.epochs"] * int(count * (1 - held_out) // batch)
    assert chosen["caco.warm_start_steps"] * batch >= chosen["caco.bank_size"]
    assert chosen["caco.warm_start_steps"] <= max(steps // 5, chosen["caco.bank_size"])
    assert chosen["schedule.warmup_epochs"] < chosen["trainer.epochs"]
    assert chosen["views.0.size"] == (224 if gpu else 96) and chosen["backbone.name"] == (
        "resnet50" if gpu else "resnet18"
    )


def test_a_given_setting_wins_and_the_others_follow_it(monkeypatch) -> None:
    facts = Facts(5_000, 300.0, False, 1)
    usual = scaled(monkeypatch, facts)
    given = scaled(monkeypatch, facts, "trainer.batch_size=256", "caco.bank_size=512", "views.1.size=64")
    assert (usual["trainer.batch_size"], usual["caco.bank_size"]) == (64, 1024)
    assert (given["trainer.batch_size"], given["caco.bank_size"], given["views.1.size"]) == (256, 512, 64)
    assert given["optimizer.lr"] == pytest.approx(2 * usual["optimizer.lr"])
    assert given["trainer.epochs"] > usual["trainer.epochs"]


@pytest.mark.parametrize(
    "method, size",
    [
        ("adco", "adco.bank_size"),
        ("nnclr", "nnclr.queue_size"),
        ("ablation", "caco.bank_size"),
        ("moco", "moco.queue_size"),
        ("clae clae.base=moco", "moco.queue_size"),
        ("cacr cacr.form=queue", "cacr.queue_size"),
        ("cacr", None),
        ("simclr", None),
    ],
)
def test_every_method_gets_a_bank_or_queue_that_fits(monkeypatch, method: str, size: str | None) -> None:
    facts = Facts(5_000, 300.0, False, 1)
    chosen = scaled(monkeypatch, facts, *f"method={method}".split())
    sizes = {key for key, value in chosen.items() if key.endswith(("bank_size", "queue_size")) and value == 1024}
    assert sizes == ({size} if size else set())


def test_a_file_based_on_it_wins_too(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.yaml").write_text("base: own_images\ntrainer: {epochs: 3}\n")
    monkeypatch.setattr(caco_fast.scale, "_look", lambda config: Facts(5_000, 300.0, False, 1))
    config, _ = load_scaled(tmp_path / "mine.yaml", ["data.path=x"])
    assert (config.trainer.epochs, config.evaluation.every_epochs, config.trainer.batch_size) == (3, 1, 64)


@pytest.mark.parametrize("name, options", [("vit_tiny_patch16_224", {"dynamic_img_size": True}), ("convnext_atto", {})])
def test_another_backbone_gets_no_options_of_a_resnet(monkeypatch, name: str, options: dict) -> None:
    chosen = scaled(monkeypatch, Facts(5_000, 32.0, False, 1), f"backbone.name={name}")
    assert (chosen["backbone.options"], chosen["backbone.stem"]) == (options, "imagenet")


def test_small_images_get_small_views(monkeypatch) -> None:
    chosen = scaled(monkeypatch, Facts(5_000, 50.0, True, 1))
    assert (chosen["views.0.size"], chosen["views.0.blur_p"], chosen["backbone.stem"]) == (32, 0.0, "small_stride2")


def test_print_config_shows_what_was_chosen(images: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--config", "own_images", f"data.path={images}", "--print-config"]
    assert main([*arguments, "trainer.epochs=7"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# chosen for 40 images of some 120 pixels, on a CPU: ") and " views.0.size=96" in shown
    assert "  epochs: 7 " in shown and "trainer.epochs=" not in shown and "  bank_size: 8 " in shown


def test_without_a_path_nothing_is_chosen() -> None:
    config, line = load_scaled("own_images")
    assert line == "" and config.trainer.epochs == Config().trainer.epochs


def test_too_few_images_are_refused(images: Path, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((images / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"data\.path: found 3 images in .*, expected at least 16"):
        load_scaled("own_images", [f"data.path={tmp_path}"])


def test_a_folder_given_in_python_keeps_the_source_of_the_configuration() -> None:
    sources = [_data_settings("DIR", find_config(name))["data.source"] for name in ("own_images", "quickstart")]
    assert sources == ["images", "folder"]
