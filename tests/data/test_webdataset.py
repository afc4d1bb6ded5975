import gzip
import io
import json
import logging
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from caco_fast.data import BadImageError, DataConfig, ViewConfig, build_eval_loader, build_source, build_train_loader
from caco_fast.data.sources import shard_table as tables
from caco_fast.data.sources.webdataset import WebDatasetSource, expand_braces, find_shards
from caco_fast.errors import UserError

VIEWS = [ViewConfig(size=8), ViewConfig(size=8, blur_p=0.1)]


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """`count` images with labels 0, 1, 2, 0, ..."""
    pairs = [((f"{n:04}.jpg", encoded(n)), (f"{n:04}.cls", b"%d" % (n % 3))) for n in range(first, first + count)]
    return [member for pair in pairs for member in pair]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three training shards of 5 images, one validation shard of 4."""
    for number in range(3):
        write_shard(tmp_path / f"toy-train-{number:03}.tar", samples(5 * number, 5))
    write_shard(tmp_path / "toy-validation-000.tar", samples(100, 4))
    return tmp_path


def test_images_come_in_the_order_of_shards_and_members(shards: Path) -> None:
    source = build_source(DataConfig(source="webdataset", path=str(shards)), "train")
    assert [source.encoded(index) for index in range(15)] == [encoded(number) for number in range(15)]
    assert [source.label(index) for index in range(15)] == [number % 3 for number in range(15)]
    assert len(source) == 15 and source.classes == ["0", "1", "2"]
    assert source.name(6) == f"{shards}/toy-train-001.tar:0006.jpg"
    assert np.array_equal(source.image(6), Image.open(io.BytesIO(encoded(6))))


def test_shards_with_validation_in_their_names_are_the_test_images(shards: Path) -> None:
    source = WebDatasetSource(str(shards), "test")
    assert [source.encoded(index) for index in range(4)] == [encoded(number) for number in range(100, 104)]


def test_folders_for_train_and_val_are_told_apart(tmp_path: Path) -> None:
    # The word counts below data.path only.
    top = tmp_path / "test"
    write_shard(top / "train" / "000.tar", samples(0, 2))
    write_shard(top / "val" / "000.tar", samples(7, 3))
    assert [len(WebDatasetSource(str(top), split)) for split in ("train", "test")] == [2, 3]


def test_training_from_shards_is_that_from_the_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("folder")
    for number in range(15):
        (folder / f"{number:04}.jpg").write_bytes(encoded(number))
    options = {"workers": 2, "loader": "torchvision"}
    configs = [DataConfig(source="webdataset", path=str(shards), **options), DataConfig(path=str(folder), **options)]
    loaders = [build_train_loader(config, VIEWS, batch_size=4, seed=3) for config in configs]
    for epoch, first in ((0, 0), (1, 2)):
        pairs = list(zip(*(loader.batches(epoch, first) for loader in loaders), strict=True))
        assert len(pairs) == 3 - first
        for left, right in pairs:
            assert torch.equal(left.index, right.index)
            assert all(torch.equal(x, y) for x, y in zip(left.views, right.views, strict=True))
    for loader in loaders:
        loader.close()


def test_evaluation_reads_labels_and_images(shards: Path) -> None:
    config = DataConfig(source="webdataset", path=str(shards), workers=0, loader="torchvision")
    ((images, labels, index),) = build_eval_loader(config, "test", batch_size=8)
    assert images.shape == (4, 3, 12, 10) and labels.tolist() == [n % 3 for n in range(100, 104)]
    assert index.tolist() == [0, 1, 2, 3]


def test_a_brace_pattern_names_the_shards(shards: Path) -> None:
    assert len(WebDatasetSource(f"{shards}/toy-train-{{000..001}}.tar")) == 10
    both = f"{shards}/toy-{{train-{{000..002}},validation-000}}.tar"
    assert [len(WebDatasetSource(both, split)) for split in ("train", "test")] == [15, 4]
    with pytest.raises(UserError, match=r"2 of the 5 shards of .* don't exist, the first is .*toy-train-003.tar"):
        WebDatasetSource(f"{shards}/toy-train-{{000..004}}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{00..02}", ["a00", "a01", "a02"]),
        ("a{9..11}b", ["a9b", "a10b", "a11b"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{x,y{1..2}}.tar", ["x.tar", "y1.tar", "y2.tar"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
    ],
)
def test_braces_are_those_of_a_shell(pattern: str, names: list[str]) -> None:
    assert sorted(expand_braces(pattern)) == sorted(names)


@pytest.mark.parametrize("pattern", ["a{0..3", "{abc}", "{0..9999999}"])
def test_a_brace_that_means_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=r"data\.path"):
        expand_braces(pattern)


def test_keys_suffixes_and_labels_are_webdatasets(tmp_path: Path) -> None:
    members = [
        ("a/n1.x.seg.png", b"not the image"),
        ("a/n1.JPEG", encoded(1)),
        ("a/n1.json", json.dumps({"label": 4, "text": "x"}).encode()),
        ("b/n1.png", encoded(2, "PNG")),
        ("b/n1.cls", b" 2\n"),
        ("b/n1.json", b"not read, there being a .cls"),
        ("__info__.json", b"{}"),
        ("text.txt", b"no image"),
        ("c/n1.cls", b"0"),
        ("c/n1.jpg", encoded(3)),
    ]
    write_shard(tmp_path / "train.tar", members)
    source = WebDatasetSource(str(tmp_path))
    assert [source.name(index).split(":")[1] for index in range(len(source))] == ["a/n1.JPEG", "b/n1.png", "c/n1.jpg"]
    assert [source.label(index) for index in range(3)] == [4, 2, 0]
    assert [source.encoded(index) for index in range(3)] == [encoded(1), encoded(2, "PNG"), encoded(3)]


def test_members_of_a_sample_need_not_follow_each_other(tmp_path: Path) -> None:
    images, labels = samples(0, 4)[::2], samples(0, 4)[1::2]
    write_shard(tmp_path / "train.tar", images + labels[::-1])
    source = WebDatasetSource(str(tmp_path))
    assert [source.encoded(index) for index in range(4)] == [encoded(number) for number in range(4)]
    assert [source.label(index) for index in range(4)] == [0, 1, 2, 0]


def test_every_suffix_of_an_image_counts(tmp_path: Path) -> None:
    members = [("0.webp", encoded(0, "WEBP")), ("1.png", encoded(1, "PNG")), ("2.tif", encoded(2, "TIFF"))]
    write_shard(tmp_path / "train.tar", members)
    source = WebDatasetSource(str(tmp_path))
    assert [source.encoded(index) for index in range(3)] == [data for _, data in members]


def test_links_are_the_member_to_which_they_lead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(write_shard(tmp_path / "train.tar", samples(1, 1)), "a") as archive:
        for name, kind, target in (
            ("x/2.jpg", tarfile.LNKTYPE, "0001.jpg"),
            ("x/2.cls", tarfile.SYMTYPE, "../0001.cls"),
            ("3.jpg", tarfile.SYMTYPE, "nowhere.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    source = WebDatasetSource(str(tmp_path))
    assert [source.encoded(index) for index in range(len(source))] == [encoded(1)] * 2
    assert source.label(1) == 1 and source.name(1).endswith(":x/2.jpg")
    assert "1 links left out" in caplog.text and "train.tar:3.jpg" in caplog.text


def test_what_is_left_out_is_counted_and_said_at_every_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("a_1.5x.png", b""), ("a_1.7x.png", b""), ("b.gif", b""), ("b.jpg", encoded(0)), ("b.mask.png", b"")]
    write_shard(tmp_path / "train-0.tar", members)
    write_shard(tmp_path / "train-1.tar", [("c.heic", b""), ("__info__.json", b"{}"), ("d.1.png", b"")])
    # The second time from the kept table.
    for _ in range(2):
        caplog.clear()
        source = WebDatasetSource(str(tmp_path))
        assert len(source) == 1 and source.encoded(0) == encoded(0)
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [line.split(",")[0].split(":")[0] for line in lines] == [
            "3 images left out",
            "2 images left out",
            "1 samples left out",
        ]
        assert [line.rpartition("/")[2] for line in lines] == [
            "train-0.tar:a_1.5x.png",
            "train-0.tar:b.gif",
            "train-1.tar:c.heic",
        ]


@pytest.mark.parametrize(
    ("kind", "content", "label"),
    [
        ("json", b'{"label": 3.0}', 3),
        ("cls", b"2.0", 2),
        ("json", b'{"label": "7"}', 7),
        ("json", b'{"text": "no label"}', None),
        ("json", b"[1]", None),
        ("json", b'{"label": "dog"}', "0.json holds 'dog'"),
        ("json", b'{"label": 2.5}', "0.json holds '2.5'"),
        ("json", b"{", "0.json holds '{'"),
        ("cls", b"cat", "0.cls holds 'cat'"),
        ("cls", b"-1", "0.cls holds '-1'"),
    ],
)
def test_a_label_that_is_no_number_is_said_and_trained_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, content: bytes, label: int | str | None
) -> None:
    write_shard(tmp_path / "train.tar", [("0.jpg", encoded(0)), (f"0.{kind}", content)])
    source = WebDatasetSource(str(tmp_path))
    assert source.label(0) == (label if isinstance(label, int) else -1)
    assert bool(source.classes) == isinstance(label, int)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == isinstance(label, str)
    if warned:
        assert warned[0].startswith("1 labels not used") and warned[0].endswith(str(label))


def test_classes_are_named_by_a_file_beside_the_shards(shards: Path) -> None:
    (shards / "classes.txt").write_text("ant\nbee\nwasp\n")
    assert WebDatasetSource(str(shards), "test").classes == ["ant", "bee", "wasp"]
    (shards / "classes.txt").write_text("ant\n")
    with pytest.raises(UserError, match=r"classes.txt names 1 classes, the labels go up to 2"):
        WebDatasetSource(str(shards))


def test_images_without_labels_can_be_trained_on_but_not_half_labelled(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.tar", samples(0, 3)[::2])
    source = WebDatasetSource(str(tmp_path))
    assert source.classes == [] and source.label(2) == -1
    write_shard(tmp_path / "train.tar", samples(0, 3)[:-1])
    with pytest.raises(UserError, match=r"train.tar:0002.jpg has no label that is a number"):
        WebDatasetSource(str(tmp_path))


def test_long_names_are_read(tmp_path: Path) -> None:
    name = "d" * 90 + "/" + "ü" * 120
    write_shard(tmp_path / "train.tar", [(f"{name}.jpg", encoded(5)), (f"{name}.cls", b"1")])
    source = WebDatasetSource(str(tmp_path))
    assert source.encoded(0) == encoded(5) and source.name(0).endswith(f":{name}.jpg") and source.label(0) == 1


def spoil(path: Path, damage: str) -> None:
    data = path.read_bytes()
    match damage:
        case "cut in an image":
            path.write_bytes(data[:1000])
        case "cut in a header":
            path.write_bytes(data[: 512 * 3 + 100])
        case "cut between members":
            path.write_bytes(data[: data.index(b"0007.jpg")])
        case "a spoilt header":
            place = data.index(b"0007.jpg")
            path.write_bytes(data[:place] + b"\xff" * 512 + data[place + 512 :])
        case "empty":
            path.write_bytes(b"")
        case "html":
            path.write_text("<html>not found</html>" * 100)
        case "compressed":
            path.write_bytes(gzip.compress(data))


REASONS = {
    "cut in an image": "the file ends at 1000",
    "cut in a header": "breaks off at byte 1536 of 1636",
    "cut between members": "breaks off at byte",
    "a spoilt header": "breaks off at byte",
    "empty": "empty",
    "html": "ReadError",
    "compressed": "compressed by gzip",
}


@pytest.mark.parametrize("damage", REASONS)
def test_a_broken_shard_is_named_with_its_reason(shards: Path, damage: str) -> None:
    spoil(shards / "toy-train-001.tar", damage)
    with pytest.raises(UserError, match="1 of 3 shards can't be used") as error:
        WebDatasetSource(str(shards))
    _, line = str(error.value).splitlines()
    assert line.strip().startswith(f"{shards}/toy-train-001.tar: ") and REASONS[damage] in line


def test_all_broken_shards_are_named_at_once(shards: Path) -> None:
    for number in (0, 2):
        spoil(shards / f"toy-train-00{number}.tar", "empty")
    with pytest.raises(UserError, match="2 of 3 shards") as error:
        WebDatasetSource(str(shards))
    assert len(str(error.value).splitlines()) == 3


def nothing(folder: Path) -> None:
    for shard in folder.glob("*.tar"):
        shard.unlink()


def compressed(folder: Path) -> None:
    (folder / "train.tar.gz").write_bytes(b"")


def images_missing(folder: Path) -> None:
    nothing(folder)
    write_shard(folder / "train.tar", [("a.txt", b"")])


def only_validation(folder: Path) -> None:
    for shard in folder.glob("*train*"):
        shard.unlink()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (nothing, "no .tar shards in"),
        (compressed, "train.tar.gz is compressed"),
        (images_missing, "no images in the 1 shards"),
        (only_validation, "none of the 1 shards of .* is for train"),
    ],
)
def test_shards_that_cannot_be_trained_from_are_one_clear_line(shards: Path, change: Callable, line: str) -> None:
    change(shards)
    with pytest.raises(UserError, match=line) as error:
        WebDatasetSource(str(shards))
    assert "\n" not in str(error.value)


def test_headers_are_read_once_and_again_where_a_shard_changed(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = WebDatasetSource(str(shards))
    read: list[str] = []
    original = tables.read_headers
    monkeypatch.setattr(tables, "read_headers", lambda shard: read.append(shard.name) or original(shard))
    again = WebDatasetSource(str(shards))
    assert read == [] and [again.encoded(i) for i in range(15)] == [before.encoded(i) for i in range(15)]
    assert [again.name(i) for i in range(15)] == [before.name(i) for i in range(15)]
    write_shard(shards / "toy-train-001.tar", samples(50, 7))
    assert len(WebDatasetSource(str(shards))) == 17 and read == ["toy-train-001.tar"]
    # What is known of other shards stays.
    assert len(WebDatasetSource(str(shards), "test")) == 4
    assert len(WebDatasetSource(str(shards))) == 17 and read == ["toy-train-001.tar", "toy-validation-000.tar"]


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_table_is_made_again(shards: Path, damage: str) -> None:
    WebDatasetSource(str(shards))
    kept = shards / tables.CACHE
    kept.write_bytes(kept.read_bytes()[:-20] if damage == "cut" else b"text")
    assert len(WebDatasetSource(str(shards))) == 15
    assert len(tables._read_cache(kept)) == 3


def test_a_table_that_cannot_be_kept_is_no_hindrance(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with caplog.at_level(logging.INFO, logger="caco_fast.data"):
        assert len(WebDatasetSource(str(shards))) == 15
    assert "No space left" in caplog.text
    assert sorted(path.name for path in shards.iterdir()) == sorted(path.name for path in find_shards(str(shards))[1])


def test_a_shard_that_is_cut_or_gone_during_the_run_gives_bad_images(shards: Path) -> None:
    source = WebDatasetSource(str(shards))
    shard = shards / "toy-train-001.tar"
    shard.write_bytes(shard.read_bytes()[:-12000])
    with pytest.raises(BadImageError, match=r"the shard ends after \d+ of its \d+ bytes"):
        source.encoded(9)
    shard.unlink()
    with pytest.raises(BadImageError, match="FileNotFoundError"):
        source.image(5)
    assert source.encoded(10) == encoded(10)


def test_the_source_travels_to_other_processes(shards: Path) -> None:
    source = WebDatasetSource(str(shards))
    source.encoded(0)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.encoded(index) for index in range(15)] == [source.encoded(index) for index in range(15)]
