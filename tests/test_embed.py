"""Features of own images: every image below a folder, by name, in three formats, whatever stops the work."""

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from torchvision.transforms import v2

from caco_fast import embed as module
from caco_fast.cli.embed import main
from caco_fast.embed import EmbedConfig, embed
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig
from caco_fast.pretrained import Pretrained
from caco_fast.protocols import features as extraction
from tests.protocols.test_features import Small, Stopped

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"a.png": (40, 30), "b/c,d.jpg": (28, 28), "b/d/e.png": (5, 90), "train/x/f.png": (33, 33), "val/g.png": (9, 9)}
# What size=16 resize=20 means, by torchvision.
BY_HAND = v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of several sizes, flat and nested; a grey one, a palette, one of 16 bits; and two that can't be read."""
    random = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    folder = tmp_path / "images" / "odd"
    folder.mkdir()
    Image.fromarray(random.integers(0, 256, (20, 31), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(random.integers(0, 256, (20, 31), dtype=np.uint8)).convert("P").save(folder / "palette.gif")
    Image.fromarray(random.integers(0, 65536, (20, 31)).astype(np.uint16)).save(folder / "sixteen.png")
    (folder / "empty.jpg").write_bytes(b"")
    (tmp_path / "images" / "b" / "text.jpg").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch) -> Small:
    made = Small()
    use(made, monkeypatch)
    monkeypatch.setattr(extraction, "SHARD", 1)
    return made


def use(backbone: nn.Module, monkeypatch: pytest.MonkeyPatch, channels: int = 3, **known: Any) -> None:
    pretrained = Pretrained(backbone, "small", BackboneConfig(), channels, **known)
    monkeypatch.setattr(module, "open_source", lambda text, architecture, trust: pretrained)


def config(images: Path, out: Path | str, **settings: Any) -> EmbedConfig:
    known = dict(data=str(images), out=str(out), size=16, resize=20, workers=0, batch_size=2, precision="f32")
    return EmbedConfig(**{**known, **settings})


def names_of(images: Path) -> list[str]:
    found = [path.relative_to(images).as_posix() for path in images.rglob("*.*")]
    return sorted(name for name in found if name not in ("odd/empty.jpg", "b/text.jpg"))


def read_back(out: Path) -> tuple[list[str], np.ndarray]:
    if out.suffix == ".npy":
        return out.with_suffix(".txt").read_text().splitlines(), np.load(out)
    if out.suffix == ".csv":
        head, *rows = csv.reader(out.read_text().splitlines())
        assert head == ["name", *(f"f{i}" for i in range(len(head) - 1))]
        return [row[0] for row in rows], np.array([row[1:] for row in rows], dtype=np.float32)
    with safe_open(out, "numpy") as file:
        assert list(file.keys()) == ["features"]
        return json.loads(file.metadata()["names"]), file.get_tensor("features")


@pytest.mark.parametrize("normalise", [False, True], ids=["as-is", "unit"])
@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".csv"])
def test_features_and_names_are_those_of_a_loop(images: Path, backbone: Small, suffix: str, normalise: bool) -> None:
    out = images.parent / "found" / f"features{suffix}"
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    found = embed("small", config(images, out, mean=mean, std=std, normalise=normalise))
    names, features = read_back(out)
    assert names == names_of(images) and features.dtype == np.float32
    for name, row in zip(names, features):
        if "sixteen" in name:
            continue
        pixels = v2.functional.normalize(BY_HAND(Image.open(images / name).convert("RGB")), mean, std)
        with torch.no_grad():
            expected = backbone.eval()(pixels[None])[0]
        expected = expected / expected.norm() if normalise else expected
        # Where DALI decodes, the resize rounds pixels otherwise than PIL.
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=0, atol=2e-3)
    assert found.images == len(names) == 8 and found.width == 6
    # Only what was asked for is left.
    text = {"features.txt"} if suffix == ".npy" else set()
    assert {path.name for path in out.parent.iterdir()} == {out.name, "features.unreadable.txt"} | text


def test_images_that_cannot_be_read_are_named(images: Path, backbone: Small) -> None:
    out = images.parent / "features.npy"
    found = embed("small", config(images, out))
    lines = (images.parent / "features.unreadable.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == ["b/text.jpg", "odd/empty.jpg"] == sorted(found.bad)
    # Once they are repaired the list is gone, and they are in the output.
    for name in found.bad:
        Image.new("RGB", (20, 20)).save(images / name)
    assert embed("small", config(images, out)).images == 10
    assert not (images.parent / "features.unreadable.txt").exists()


def test_a_stop_loses_nothing(images: Path, backbone: Small) -> None:
    expected = read_back(embed("small", config(images, images.parent / "whole.npy")).path)[1]
    backbone.seen, backbone.stop_at = 0, 6
    out = images.parent / "features.npy"
    # Not folded, so that the module that counts computes.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caco_fast.protocols.base.Folded", lambda backbone, precision: backbone)
        with pytest.raises(Stopped):
            embed("small", config(images, out))
        assert not out.exists() and backbone.seen > 0
        before, backbone.seen, backbone.stop_at = backbone.seen, 0, 10**9
        embed("small", config(images, out))
    assert 0 < backbone.seen < 8 and before + backbone.seen <= 8 + 2
    np.testing.assert_allclose(read_back(out)[1], expected, rtol=1e-4, atol=1e-5)


def test_a_full_disk_at_the_end_is_one_line(images: Path, backbone: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = images.parent / "features.npy"
    with monkeypatch.context() as patch:
        patch.setattr(module, "atomic_write", full)
        with pytest.raises(
            UserError, match="out: can't write .*: No space left on device; .* the same command continues"
        ):
            embed("small", config(images, out))
    backbone.seen = 0
    embed("small", config(images, out))
    assert backbone.seen == 0


def test_a_backbone_of_one_channel_sees_grey_images(
    images: Path, backbone: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = Small(channels=1)
    use(grey, monkeypatch, channels=1, mean=(0.3,), std=(0.5,))
    out = images.parent / "features.npy"
    embed("small", config(images, out))
    names, features = read_back(out)
    with torch.no_grad():
        pixels = BY_HAND(Image.open(images / "a.png").convert("L"))
        expected = grey.eval()((pixels[None] - 0.3) / 0.5)[0]
    torch.testing.assert_close(torch.from_numpy(features[names.index("a.png")]), expected, rtol=1e-4, atol=1e-5)


def test_the_default_size_is_that_of_imagenet(images: Path) -> None:
    found = module.data_config(config(images, images / "o.npy", size=None, resize=None), Pretrained(
        Small(), "small", BackboneConfig(), 3
    ))  # fmt: skip
    assert (found.eval_resize, found.eval_size) == (256, 224)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"out": "x.txt"}, "out: found 'x.txt', expected a file name that ends with"),
        ({"out": ""}, "out: found nothing"),
        ({"data": ""}, "data: found nothing"),
        ({"data": "nowhere"}, "nowhere doesn't exist"),
        ({"precision": "f64"}, "precision: found 'f64'"),
        ({"size": 0}, "size: found 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"workers": -1}, "workers: found -1"),
        ({"device": "tpu"}, "device: found 'tpu'"),
        ({"mean": [0.5], "std": [0.5]}, "mean: found 1 values, expected 3"),
    ],
)
def test_a_wrong_setting_is_one_line(images: Path, backbone: Small, settings: dict, line: str) -> None:
    with pytest.raises(UserError, match=line) as found:
        embed("small", config(images, **{"out": images.parent / "o.npy", **settings}))
    assert "\n" not in str(found.value)


def test_a_folder_without_images_is_one_line(tmp_path: Path, backbone: Small) -> None:
    with pytest.raises(UserError, match="data: found no images in"):
        embed("small", config(tmp_path, tmp_path / "o.npy"))


def test_the_command(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config"]) == 0 and "normalise: false" in capsys.readouterr().out
    assert main([f"data={images}", "out=o.npy"]) == 2 and "SOURCE: found none" in capsys.readouterr().err
    assert main(["random:resnet18", "dat=x"]) == 2 and "did you mean 'data'" in capsys.readouterr().err
    assert main(["random:resnet18", "out=o.npy"]) == 2 and "data: found nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(images: Path) -> None:
    outs = [images.parent / "one.npy", images.parent / "two.npy"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [str(ROOT / "tools" / "embed.py"), "random:resnet18", f"data={images}", "size=16", "precision=f32"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for out, start in zip(outs, ([], ranks)):
        command = [sys.executable, *start, *script, f"out={out}", "workers=0", "batch_size=3"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (names, one), (others, two) = map(read_back, outs)
    assert names == others == names_of(images)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert (images.parent / "one.unreadable.txt").read_text() == (images.parent / "two.unreadable.txt").read_text()


def test_a_missing_directory_is_named_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^data: .*doesn't exist, expected a directory with images in it"):
        embed("random:resnet18", EmbedConfig(data=str(tmp_path / "nowhere"), out=str(tmp_path / "a.npy"), device="cpu"))
