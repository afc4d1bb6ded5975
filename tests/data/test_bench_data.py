"""The benchmark of the loaders and the corpus that it is run on."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caco_fast.data.sources.folder import FolderSource
from caco_fast.errors import UserError
from tests.tool import load_tool


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two textured colour pictures; to be left out: a copy of half the size, a flat, a grey, a small, a broken one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)

    def picture(side: int) -> Image.Image:
        layers = [
            Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).resize((side * 4 // 3, side))
            for shape in ((6, 8), (180, 240))
        ]
        return Image.blend(*layers, 0.3)

    first = picture(1300)
    first.save(folder / "a.jpg", quality=95)
    first.resize((866, 650), Image.Resampling.BOX).save(folder / "a_small.jpg", quality=95)
    picture(800).save(folder / "b.png", compress_level=1)
    Image.new("RGB", (900, 900), (10, 200, 30)).save(folder / "flat.png")
    picture(700).convert("L").save(folder / "grey.jpg")
    picture(300).save(folder / "little.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def test_a_corpus_is_cut_from_photographs_alike_for_a_seed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_tool("make/jpeg_corpus").main
    for name in ("one", "two"):
        main([str(tmp_path / name), "--photos", str(photos), "--images", "20"])
    assert "20 images of 2 photographs" in capsys.readouterr().out
    record = json.loads((tmp_path / "one" / "corpus.json").read_text())
    sources = [FolderSource(str(tmp_path / "one"), split) for split in ("train", "test")]
    assert [len(source) for source in sources] == [18, 2] and record["images"] == 20
    lengths = [len(source.encoded(index)) for source in sources for index in range(len(source))]
    assert record["mean_bytes"] == round(np.mean(lengths))
    sizes = {source.image(index).size for source in sources for index in range(len(source))}
    assert sizes <= set(load_tool("make/jpeg_corpus").SHAPES)
    tops = [tmp_path / name for name in ("one", "two")]
    files = [{str(file.relative_to(top)): file.read_bytes() for file in top.rglob("*.JPEG")} for top in tops]
    assert files[0] == files[1] and sorted(os.listdir(tmp_path)) == ["one", "photos", "two"]


def test_a_corpus_is_not_made_of_nothing_nor_over_something(tmp_path: Path, photos: Path) -> None:
    main = load_tool("make/jpeg_corpus").main
    for name in ("a.jpg", "b.png"):
        (photos / name).unlink()
    (photos / "a_small.jpg").unlink()
    with pytest.raises(UserError, match="none of 4 images is a photograph of at least 600 pixels"):
        main([str(tmp_path / "corpus"), "--photos", str(photos)])
    with pytest.raises(UserError, match="is there already"):
        main([str(photos), "--photos", str(photos)])
    with pytest.raises(UserError, match="nowhere is no directory"):
        main([str(tmp_path / "corpus"), "--photos", str(tmp_path / "nowhere")])
    assert sorted(os.listdir(tmp_path)) == ["photos"]


@pytest.fixture
def corpus(tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    for number in range(24):
        write_image(tmp_path / "train" / "a" / f"{number}.JPEG", seed=number)
    return tmp_path


def test_the_benchmark_writes_rates_times_and_ratios(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    main = load_tool("bench/data").main
    output = corpus / "bench.json"
    options = ["--device", "cpu", "--loaders", "dali cpu fast", "--batch-size", "2", "--batches", "2", "--repeats", "2"]
    main([str(corpus), *options, "--workers", "1", "--cases", "decode", "two", "--output", str(output)])
    record = json.loads(output.read_text())
    assert [(entry["case"], entry["workers"], entry["loader"]) for entry in record["results"]] == [
        ("decode", 1, "torchvision"),
        ("decode", 1, "dali cpu"),
        ("two", 1, "torchvision"),
        ("two", 1, "dali cpu fast"),
    ]
    for entry in record["results"]:
        for ratio in ("times_torchvision", "times_torchvision_per_cpu_second"):
            is_one = entry[ratio] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
            assert is_one == (entry["loader"] == "torchvision")
        assert 0 < entry["images_per_second"]["p20"] <= entry["images_per_second"]["p80"]
    assert record["settings"]["corpus"]["images"] == 24 and "machine" in record
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--table", str(output)])
    assert ended.value.code == 0
    assert "| two views | 1 | dali cpu fast |" in capsys.readouterr().out


def test_the_processor_time_of_workers_is_counted(corpus: Path) -> None:
    bench = load_tool("bench/data")
    context = bench.multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    before = bench.processor_seconds()
    worker = context.Process(target=_work, args=(ready, end))
    worker.start()
    ready.wait()
    assert bench.processor_seconds() - before >= 0.25
    end.set()
    worker.join()


def _work(ready: object, end: object) -> None:
    import time

    while time.process_time() < 0.3:
        pass
    ready.set()
    end.wait()


def test_what_the_benchmark_cannot_measure_is_one_clear_line(corpus: Path) -> None:
    main = load_tool("bench/data").main
    with pytest.raises(UserError, match="has 24 training images, 1[0-9]{3} are needed"):
        main([str(corpus), "--device", "cpu", "--workers", "2"])
    with pytest.raises(UserError, match="--loaders: ffcv is not here; there are torchvision"):
        main([str(corpus), "--device", "cpu", "--batch-size", "1", "--batches", "2", "--loaders", "ffcv"])
    with pytest.raises(UserError, match="no such file"):
        main(["--table", str(corpus / "none.json")])
