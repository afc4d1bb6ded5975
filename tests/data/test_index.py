import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from caco_fast.data import (
    BadImageError,
    DataConfig,
    ViewConfig,
    build_eval_loader,
    build_source,
    build_train_loader,
)
from caco_fast.data.sources import make_index
from caco_fast.data.sources.base import Names
from caco_fast.data.sources.folder import FolderSource
from caco_fast.data.sources.index import IndexSource, SplitIndex, read_index, write_index
from caco_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
VIEWS = [ViewConfig(size=8), ViewConfig(size=8, blur_p=0.1)]


@pytest.fixture
def tool() -> Callable[..., int]:
    """The program of tools/index_data.py in this process, with one worker; it raises its errors."""
    return lambda *arguments: make_index.index_folder([*map(str, arguments), "--workers", "1"])


def write_quick(folder: Path, output: Path, root: str = ".") -> Path:
    """An index of a folder whose files are all good, without the worker processes of the tool."""
    splits = {}
    for split in ("train", "test"):
        source = FolderSource(str(folder), split)
        sizes = np.array([source.image(index).size[::-1] for index in range(len(source))], np.int32)
        files = [source.encoded(index) for index in range(len(source))]
        lengths, checksums = np.array(list(map(len, files))), np.array(list(map(zlib.crc32, files)))
        place = os.path.relpath(source.root, folder)
        splits[split] = SplitIndex(place, source.classes, source.names, source.labels, sizes, lengths, checksums)
    with open(output, "wb") as file:
        write_index(file, root, splits)
    return output


@pytest.fixture
def index(image_folder: Path) -> Path:
    return write_quick(image_folder, image_folder / "index.npz")


def test_training_over_the_index_is_training_over_the_folder(image_folder: Path, tool: Callable[..., int]) -> None:
    assert tool(image_folder) == 0
    index = DataConfig(source="index", path=str(image_folder / "caco_fast_index.npz"), workers=0, loader="torchvision")
    folder = DataConfig(path=str(image_folder), workers=0, loader="torchvision")
    left, right = (build_train_loader(config, VIEWS, batch_size=4, seed=3) for config in (index, folder))
    assert left.steps_per_epoch == right.steps_per_epoch == 3
    for epoch in (0, 1):
        for a, b in zip(left.batches(epoch), right.batches(epoch), strict=True):
            assert torch.equal(a.index, b.index)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    for a, b in zip(*(build_eval_loader(config, "test", batch_size=8) for config in (index, folder)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for split in ("train", "test"):
        sources = [build_source(config, split) for config in (index, folder)]
        assert sources[0].classes == sources[1].classes
        names = [[source.name(number) for number in range(len(source))] for source in sources]
        assert names[0] == names[1]


def damage(folder: Path) -> dict[str, str]:
    """Spoils files of the fixture's training set; name -> kind of what is to be reported."""
    ant, bee = folder / "train" / "ant", folder / "train" / "bee"
    whole = (ant / "ant_0.JPEG").read_bytes()
    (ant / "ant_1.JPEG").write_bytes(whole[:-200])
    (ant / "ant_2.JPEG").write_bytes(b"")
    (ant / "ant_3.JPEG").write_text("<html>")
    Image.new("CMYK", (5, 4)).save(ant / "ant_4.JPEG")
    Image.new("RGB", (7, 3)).save(bee / "bee_0.JPEG", "PNG")
    (bee / "bee_1.JPEG").write_bytes(whole)
    (bee / "bee_2.JPEG").unlink()
    (bee / "bee_2.JPEG").mkdir()
    (bee / "bee_3.JPEG").unlink()
    (bee / "bee_3.JPEG").symlink_to("nowhere")
    (folder / "val" / "ant" / "ant_1.JPEG").write_bytes(whole)
    broken = dict.fromkeys(("train/ant/ant_1", "train/ant/ant_3", "train/bee/bee_2", "train/bee/bee_3"), "broken")
    others = {"train/ant/ant_2": "zero-byte", "train/ant/ant_4": "CMYK", "train/bee/bee_0": "wrong suffix"}
    copies = dict.fromkeys(("train/bee/bee_1", "val/ant/ant_1"), "duplicate")
    return {f"{folder}/{name}.JPEG": kind for name, kind in {**broken, **others, **copies}.items()}


def test_what_cannot_be_decoded_is_left_out_and_everything_odd_is_reported(
    image_folder: Path, tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    # The fixture's val files are those of train again.
    for number, file in enumerate(sorted((image_folder / "val").glob("*/*"))):
        Image.new("RGB", (9 + number, 9)).save(file)
    wanted = damage(image_folder)
    assert tool(image_folder, "--output", image_folder / "i.npz") == 0
    lines = (image_folder / "i.npz.report.txt").read_text().splitlines()
    assert {line.split("\t")[1]: line.split("\t")[0] for line in lines} == wanted and len(lines) == len(wanted)
    reasons = {Path(name).stem: reason for _, name, reason in (line.split("\t") for line in lines)}
    assert "truncated" in reasons["ant_1"] or "same bytes" in reasons["ant_1"]
    assert reasons["bee_0"] == "a PNG named .jpeg" and "directory" in reasons["bee_2"]
    assert reasons["bee_1"] == f"the same bytes as {image_folder}/train/ant/ant_0.JPEG"

    shown = capsys.readouterr().out
    assert "train: 7 of 12 files in 2 classes" in shown and "4 broken, left out" in shown and "2 duplicate:" in shown
    source = IndexSource(str(image_folder / "i.npz"))
    kept = [Path(source.name(number)).stem for number in range(len(source))]
    assert kept == ["ant_0", "ant_4", "ant_5", "bee_0", "bee_1", "bee_4", "bee_5"]
    assert [source.label(number) for number in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    sizes = [list(source.image(number).size[::-1]) for number in range(7)]
    assert read_index(image_folder / "i.npz", "train")[1].sizes.tolist() == sizes and sizes[3] == [3, 7]

    assert tool(image_folder, "--output", image_folder / "i.npz", "--strict", "--drop-duplicates") == 1
    assert [len(IndexSource(str(image_folder / "i.npz"), split)) for split in ("train", "test")] == [6, 4]


def test_folder_and_index_may_be_moved(
    image_folder: Path, index: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = tmp_path_factory.mktemp("other") / "images"
    shutil.copytree(image_folder, moved)
    shutil.rmtree(image_folder / "train")
    assert IndexSource(str(moved / "index.npz")).name(0) == str(moved / "train" / "ant" / "ant_0.JPEG")
    with pytest.raises(UserError, match=r"where the index says the images are, is no directory; .*data\.root=DIR"):
        IndexSource(str(index))
    config = DataConfig(source="index", path=str(index), root=str(moved))
    assert build_source(config, "train").encoded(0) == (moved / "train" / "ant" / "ant_0.JPEG").read_bytes()


def test_an_index_outside_of_the_folder_names_it_absolutely(
    image_folder: Path,
    tool: Callable[..., int],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path_factory.mktemp("indexes") / "i.npz"
    monkeypatch.chdir(image_folder.parent)
    assert tool(image_folder.name, "--output", output) == 0
    monkeypatch.chdir("/")
    assert IndexSource(str(output)).name(0) == str(image_folder.resolve() / "train" / "ant" / "ant_0.JPEG")


def test_an_index_of_other_images_is_refused(image_folder: Path, index: Path) -> None:
    for file in (image_folder / "train").glob("*/*"):
        file.rename(file.with_name("renamed_" + file.name))
    with pytest.raises(UserError, match=r"has none of 12 images that the index lists"):
        IndexSource(str(index))


def test_files_changed_since_the_index_was_made_are_bad_images(image_folder: Path, index: Path) -> None:
    source = IndexSource(str(index))
    with open(source.path(1), "ab") as file:
        file.write(b"more")
    source.path(2).unlink()
    for read in (source.image, source.encoded):
        with pytest.raises(BadImageError, match=r"\d+ bytes, the index says \d+: changed since it was made"):
            read(1)
        with pytest.raises(BadImageError, match="FileNotFoundError"):
            read(2)
    rewritten = bytearray(source.encoded(4))
    rewritten[len(rewritten) // 2] ^= 1
    source.path(4).write_bytes(rewritten)
    with pytest.raises(BadImageError, match="another checksum than in the index: changed since it was made"):
        source.encoded(4)
    assert source.encoded(3) == source.path(3).read_bytes()


def foreign(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def header(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def reheaded(data: bytes, old: bytes, new: bytes) -> bytes:
    """The index with a part of its header replaced, its checksums being right."""
    with np.load(io.BytesIO(data)) as stored:
        arrays = {name: stored[name] for name in stored}
    before = arrays["header"].tobytes()
    assert old in before
    arrays["header"] = np.frombuffer(before.replace(old, new), dtype=np.uint8)
    return foreign(**arrays)


def relabelled(data: bytes) -> bytes:
    with np.load(io.BytesIO(data)) as stored:
        arrays = {name: stored[name] for name in stored}
    arrays["train.labels"][3] += 1
    return foreign(**arrays)


def flipped(data: bytes) -> bytes:
    place = data.index(b"train.sizes.npy") + 100
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[: len(data) // 2], "is not a readable index"),
    "empty": (lambda data: b"", "is not a readable index"),
    "text": (lambda data: b"a list of images", "is not a readable index"),
    "an image": (lambda data: Path(__file__).read_bytes(), "is not a readable index"),
    "another npz": (lambda data: foreign(images=np.zeros(3)), "it has no header"),
    "another header": (lambda data: foreign(header=header('{"format": "x"}')), "another kind of file"),
    "no JSON": (lambda data: foreign(header=header("{")), "is not a readable index"),
    "a flipped bit": (flipped, "is not a readable index|doesn't have the hash"),
    "another list": (relabelled, "doesn't have the hash that its header names"),
    "other classes": (lambda data: reheaded(data, b'"bee"', b'"fly"'), "doesn't have the hash that its header names"),
    "a later version": (lambda data: reheaded(data, b'"version": 2', b'"version": 3'), "has version 3, expected 2"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_foreign_index_is_one_clear_line(index: Path, kind: str) -> None:
    spoil, line = DAMAGE[kind]
    index.write_bytes(spoil(index.read_bytes()))
    with pytest.raises(UserError, match=line) as error:
        IndexSource(str(index))
    assert "\n" not in str(error.value) and str(index) in str(error.value) and "index_data.py" in str(error.value)


def test_a_wrong_path_is_one_clear_line(index: Path, image_folder: Path) -> None:
    wrong = {image_folder / "no.npz": "doesn't exist; tools/index_data.py", image_folder: "is a directory"}
    for path, line in wrong.items():
        with pytest.raises(UserError, match=line):
            IndexSource(str(path))
    with pytest.raises(UserError, match="data.path: found nothing, but the index source needs the file"):
        build_source(DataConfig(source="index"), "train")
    with pytest.raises(UserError, match="only an index has a root"):
        build_source(DataConfig(path=str(image_folder), root="x"), "train")


def test_an_index_without_test_images_says_so(image_folder: Path, tool: Callable[..., int]) -> None:
    shutil.rmtree(image_folder / "val")
    assert tool(image_folder) == 0
    with pytest.raises(UserError, match=r"has no test images; make it again from a folder with val/"):
        IndexSource(str(image_folder / "caco_fast_index.npz"), "test")


def test_a_flat_folder_without_classes_is_indexed(
    tmp_path: Path, write_image: Callable[..., Path], tool: Callable[..., int]
) -> None:
    for number in range(3):
        write_image(tmp_path / f"{number}.jpg", seed=number)
    assert tool(tmp_path) == 0
    source = IndexSource(str(tmp_path / "caco_fast_index.npz"))
    assert source.classes == [] and source.label(0) == -1 and len(source) == 3
    assert source.name(0) == str(tmp_path / "0.jpg")


def test_the_tool_refuses_what_it_cannot_do_before_it_begins(
    image_folder: Path, tool: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(make_index, "inspect", fail)
    theirs = image_folder / "theirs.npz"
    theirs.write_bytes(foreign(images=np.zeros(3)))
    for output, line in (
        (theirs, "would be replaced"),
        (image_folder / "index.json", "ends with .npz"),
        (image_folder / "no" / "i.npz", "is no directory"),
    ):
        with pytest.raises(UserError, match=line):
            tool(image_folder, "--output", output)
    assert theirs.read_bytes() == foreign(images=np.zeros(3))


def test_no_readable_image_is_an_error_and_leaves_no_index(tmp_path: Path, tool: Callable[..., int]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images in .* can be decoded"):
        tool(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_a_worker_that_dies_is_one_clear_line(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_index, "_start_worker", partial(os._exit, 1))
    with pytest.raises(UserError, match="a worker process was killed, most likely for lack of memory"):
        make_index.inspect(FolderSource(str(image_folder)), workers=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_the_old_index_and_no_part_of_a_new_one(image_folder: Path, number: signal.Signals) -> None:
    old = write_quick(image_folder, image_folder / "caco_fast_index.npz").read_bytes()
    # A pipe that nobody writes to: the worker waits for it.
    pipe = image_folder / "train" / "ant" / "pipe.jpg"
    os.mkfifo(pipe)
    before = sorted(image_folder.iterdir())
    command = [sys.executable, str(ROOT / "tools" / "index_data.py"), str(image_folder), "--workers", "1"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that starts this in the background makes it ignore SIGINT, and a child inherits that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, **output, start_new_session=True, preexec_fn=heed)
    # Opening the end to write to succeeds once the worker has the other one.
    deadline = time.monotonic() + 60
    while True:
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    time.sleep(0.2)
    os.close(writer)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err, err
    assert (image_folder / "caco_fast_index.npz").read_bytes() == old
    assert sorted(image_folder.iterdir()) == before


def test_names_are_kept_as_they_are() -> None:
    listed = [b"a/1.jpg", b"", b"caf\xe9.jpg", b"b"]
    names = Names.of(listed)
    assert [names[index] for index in range(4)] == listed
    assert [names.take(np.array([3, 1]))[index] for index in range(2)] == [b"b", b""]
    assert len(Names.of([])) == 0


def test_the_hash_of_the_list_knows_the_list_and_not_the_place(image_folder: Path, index: Path) -> None:
    root, split = read_index(index, "train")
    other = write_quick(image_folder, image_folder / "other.npz", root="/elsewhere")
    assert root == "." and read_index(other, "train")[1].list_hash() == split.list_hash()
    assert read_index(other, "test")[1].list_hash() != split.list_hash()


def test_a_run_may_go_on_from_folder_to_index_but_not_to_another_list(image_folder: Path, index: Path) -> None:
    config = DataConfig(source="index", path=str(index), loader="torchvision", workers=0)
    folder = DataConfig(path=str(image_folder), loader="torchvision", workers=0)

    def images(config: DataConfig) -> str:
        return build_train_loader(config, VIEWS, batch_size=4, seed=0).images

    assert images(config) == images(folder)
    (image_folder / "train" / "ant" / "ant_0.JPEG").rename(image_folder / "train" / "ant" / "z.JPEG")
    assert images(config) != images(folder)
