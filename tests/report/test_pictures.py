"""The parts of a page that need encoder, bank and images: their figures against loops, and what is missing."""

import math
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.data import ViewConfig, build_train_loader
from caco_fast.engine.checkpoint import load_state
from caco_fast.errors import UserError
from caco_fast.models import build_encoder_pair
from caco_fast.protocols.neighbours import nearest
from caco_fast.report.bank import nearest_rows, perplexity, rows_shown
from caco_fast.report.neighbours import confused_pairs, neighbours_part, votes
from caco_fast.report.parts import Facts, Missing, Part, Picture, Table
from caco_fast.report.pictures import PicturesConfig, picture_parts
from caco_fast.report.sample import Sample, _Until
from caco_fast.report.surrogates import surrogates_part
from caco_fast.report.views import views_of, views_part
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a run of three steps with as many checkpoints, and one without a bank and labels."""
    found = tmp_path_factory.mktemp("pictures")
    images = write_images(found / "images", test=16)
    settings = ["trainer.max_steps=3", "checkpoint.every_steps=1", "evaluation.every_epochs=0", "evaluation.k=[3]"]
    settings += ["caco.warm_start_steps=1", "trainer.log_every=100", "evaluation.baselines=false"]
    settings += ["evaluation.linear_probe=false"]
    train(config(images, *settings), found / "caco")
    bare = ["method=simclr", "data.source=images", "evaluation.held_out=0.2", "trainer.max_steps=1"]
    train(config(images / "train", *settings[3:], *bare, "evaluation.every_epochs=0"), found / "simclr")
    return found


@pytest.fixture(scope="session")
def sample(place: Path) -> Sample:
    return Sample(place / "caco", PicturesConfig(), CPU)


@pytest.fixture(scope="session")
def parts(place: Path) -> dict[str, Part]:
    return {part.anchor: part for part in picture_parts(place / "caco", PicturesConfig(), CPU)}


def encoder_of(place: Path, step: int, name: str) -> tuple[Any, Tensor]:
    """The encoder `query` or `key`, and the bank, from the file of a step."""
    state = load_state(place / "caco" / "checkpoints" / f"step_{step:08d}.pt")
    settings = config(place / "images")
    encoder = getattr(build_encoder_pair(settings.backbone, settings.projector, 3), name).eval()
    weights = state["encoders"].items()
    encoder.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights if k.startswith(f"{name}.")})
    (bank,) = (value for key, value in state["method"].items() if key.endswith(".bank"))
    return encoder, bank.double()


def rows_of(encoder: Any, source: Any) -> list[Tensor]:
    """The embedding of each image of a source, one image at a time."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (source.mean, source.std))
    found = []
    with torch.no_grad():
        for index in range(len(source)):
            # The views are as large as the centre of the images, 32 of 37 pixels of the shorter side.
            image = source.image(index).resize((37, 37), 2).crop((2, 2, 34, 34))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
            found.append(encoder((pixels[None] - mean) / std)[0][0].double())
    return found


def best(row: Tensor, others: list[Tensor]) -> int:
    return max(range(len(others)), key=lambda i: float(F.cosine_similarity(row, others[i], dim=0)))


def test_every_part_is_there(parts: dict[str, Part]) -> None:
    assert list(parts) == ["bank", "surrogates", "neighbours", "map", "views"]
    blocks = [block for part in parts.values() for block in part.blocks]
    assert not [block for block in blocks if isinstance(block, Missing)]
    pictures = [block for block in blocks if isinstance(block, Picture)]
    assert len(pictures) == 7
    assert all(picture.alt and "<svg" in picture.content for picture in pictures)
    assert not [picture for picture in pictures if "http" in picture.content]
    assert sum(len(picture.content) for picture in pictures) < 2_000_000


def test_choices_are_those_of_a_loop(place: Path, sample: Sample, parts: dict[str, Part]) -> None:
    encoder, bank = encoder_of(place, 3, "key")
    chosen = [best(key, list(bank)) for key in rows_of(encoder, sample.train_source)]
    counts = [chosen.count(row) for row in range(37)]
    assert sample.counts.tolist() == counts
    facts = next(dict(block.values) for block in parts["bank"].blocks if isinstance(block, Facts))
    dead = counts.count(0)
    assert facts["dead rows, which no image chose"] == f"{dead} ({100 * dead / 37:.1f} %)"
    entropy = -sum(c / 40 * math.log(c / 40) for c in counts if c)
    assert facts["perplexity of the choices, in rows"] == f"{math.exp(entropy):,.1f}"
    most = sorted(counts, reverse=True)
    half = next(n for n in range(38) if sum(most[:n]) >= 20)
    assert facts["rows that half of the images chose"] == str(half)


def test_right_surrogates_of_every_checkpoint_are_those_of_loops(place: Path, sample: Sample) -> None:
    (table,) = (block for block in surrogates_part(sample).blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == ["step 1", "step 2", "step 3"]
    train_labels = [sample.train_source.label(i) for i in range(40)]
    answers = [sample.test_source.label(i) for i in range(32)]
    for step, (_, share, chance) in enumerate(table.rows, start=1):
        encoder, bank = encoder_of(place, step, "query")
        of_train, of_test = (rows_of(encoder, s) for s in (sample.train_source, sample.test_source))
        labels = [train_labels[best(row, of_train)] for row in bank]
        right = [labels[best(query, list(bank))] == answer for query, answer in zip(of_test, answers)]
        by_chance = [label == answer for label in labels for answer in answers]
        assert (share, chance) == tuple(f"{100 * sum(each) / len(each):.1f} %" for each in (right, by_chance))


def test_neighbours_are_those_of_a_loop(place: Path, sample: Sample, parts: dict[str, Part]) -> None:
    backbone = encoder_of(place, 3, "query")[0].backbone
    of_train, of_test = (
        rows_of(lambda images: [backbone(images)], source) for source in (sample.train_source, sample.test_source)
    )
    same, right = 0, 0
    for number, query in enumerate(of_test):
        answer = sample.test_source.label(number)
        cosine = [float(F.cosine_similarity(query, row, dim=0)) for row in of_train]
        near = sorted(range(40), key=lambda i: -cosine[i])[:20]
        same += sum(sample.train_source.label(i) == answer for i in near[:8])
        ballot = [sum(math.exp(cosine[i] / 0.2) for i in near if sample.train_source.label(i) == c) for c in (0, 1)]
        right += ballot.index(max(ballot)) == answer
    facts = next(dict(block.values) for block in parts["neighbours"].blocks if isinstance(block, Facts))
    assert facts["neighbours of the same class, of 8"] == f"{100 * same / (8 * 32):.1f} %"
    assert facts["kNN (k 20) with the sampled images alone"] == f"{100 * right / 32:.1f} %"


def test_frames_are_around_images_of_another_class(sample: Sample) -> None:
    found = neighbours_part(sample).blocks[0]
    assert isinstance(found, Picture)
    # The 24 test images that are shown, in the order of the set, and what a search for each of them gives.
    shown = [round(31 * n / 23) for n in range(24)]
    place = {int(index): row for row, index in enumerate(sample.test.index)}
    queries = sample.test.outputs[0][[place[index] for index in shown]]
    _, near = nearest(queries, sample.train.outputs[0], 8)
    wrong = sum(
        sample.train.labels[row] != sample.test_source.label(index)
        for index, rows in zip(shown, near.tolist())
        for row in rows
    )
    assert found.content.count('stroke="#c8321e"') == wrong > 0


def test_pairs_that_are_confused_are_counted() -> None:
    answers, guesses = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([1, 1, 0, 1, 0, 0, 0])
    assert confused_pairs(guesses, answers) == [(0, 1, 2), (2, 0, 2), (1, 0, 1)]


def test_a_near_neighbour_outvotes_two_far_ones() -> None:
    assert votes(torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[2, 0, 0]]), 3).tolist() == [2]
    assert votes(torch.tensor([[0.9, 0.85, 0.8]]), torch.tensor([[2, 0, 0]]), 3).tolist() == [0]


def test_nearest_rows_are_those_of_a_loop() -> None:
    bank = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10).unsqueeze(1)
    cosine = [[float(F.cosine_similarity(a, b, dim=0)) for b in bank] for a in bank]
    expected = [max(c for j, c in enumerate(row) if j != i) for i, row in enumerate(cosine)]
    assert nearest_rows(bank).tolist() == pytest.approx(expected, abs=1e-6)
    assert nearest_rows(bank, 3).tolist() == pytest.approx([expected[i] for i in (0, 4, 8)], abs=1e-6)


def test_perplexity_of_even_choices_is_the_number_of_rows() -> None:
    assert perplexity(torch.tensor([5, 5, 0, 5])) == pytest.approx(3)


@pytest.mark.parametrize("rows", [5, 37, 100])
def test_rows_of_the_sheet(rows: int) -> None:
    counts = torch.arange(rows).flip(0)
    shown = rows_shown(counts)
    every = [row for _, group in shown for row in group]
    assert len(every) == len(set(every)) == min(48, rows)
    assert shown[0][1] == list(range(min(16, rows)))
    if rows == 100:
        assert shown[1][1] == list(range(42, 58)) and shown[2][1] == list(range(84, 100))


def test_views_are_those_of_the_run(place: Path, sample: Sample) -> None:
    settings = sample.config
    loader = build_train_loader(settings.data, settings.views, batch_size=8, seed=settings.trainer.seed)
    batch = next(loader.batches(0))
    drawn, index = views_of(sample, sample.train_source, batch.index.numpy())
    assert index == batch.index.tolist()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (sample.train_source.mean, sample.train_source.std))
    for own, view in zip(drawn, batch.views, strict=True):
        torch.testing.assert_close(own, view * std + mean)


def test_small_crops_are_shown_smaller(place: Path) -> None:
    made = Sample(place / "caco", PicturesConfig(), CPU)
    views = [ViewConfig(count=2, size=32), ViewConfig(count=3, size=16)]
    made.saved = made.saved._replace(config=replace(made.config, views=views))
    sheet, recipe = views_part(made).blocks
    assert isinstance(sheet, Picture) and isinstance(recipe, Table)
    sides = [float(side) for side in re.findall(r'<svg x="[^"]*" y="[^"]*" width="([^"]*)"', sheet.content)]
    assert [sides.count(48), sides.count(24)] == [8 * (1 + 2), 8 * 3]
    assert [row[:2] for row in recipe.rows] == [["2 ×", "32 px"], ["3 ×", "16 px"]]


def test_a_map_has_a_dot_for_each_image(parts: dict[str, Part]) -> None:
    picture = parts["map"].blocks[0]
    assert isinstance(picture, Picture)
    paths = re.findall(r'<path d="([^"]*)"[^>]*><title>(\w+)</title>', picture.content)
    assert [name for _, name in paths] == ["cold", "warm"] * 2
    assert [dots.count("h0") for dots, _ in paths] == [16] * 4
    assert "<image" in picture.content


def test_without_bank_and_labels(place: Path) -> None:
    found = {part.anchor: part for part in picture_parts(place / "simclr", PicturesConfig(test_images=30), CPU)}
    assert list(found) == ["neighbours", "map", "views"]
    reasons = [b.reason for part in found.values() for b in part.blocks if isinstance(b, Missing)]
    assert reasons == [
        "which classes are confused, since the images have no labels",
        "the map of the features: found 8 images, expected at least 30",
    ]
    sheet = found["neighbours"].blocks[0]
    assert isinstance(sheet, Picture) and "no test images" in sheet.caption and "#c8321e" not in sheet.content


def test_images_that_are_gone_are_named(place: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    shutil.copytree(place / "caco", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        payload = torch.load(file, weights_only=True)
        payload["state"]["config"] = payload["state"]["config"].replace(str(place / "images"), str(images))
        torch.save(payload, file)
    shutil.rmtree(images)
    found = {part.anchor: part for part in picture_parts(tmp_path / "run", PicturesConfig(), CPU)}
    assert list(found) == ["bank", "surrogates", "neighbours", "map", "views"]
    for part in found.values():
        missing = [block.reason for block in part.blocks if isinstance(block, Missing)]
        assert missing and all(f"{images} doesn't exist" in reason for reason in missing)
    # What the rows alone show is there.
    assert [type(block) for block in found["bank"].blocks] == [Missing, Picture, Missing]


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (part,) = picture_parts(tmp_path, PicturesConfig(), CPU)
    (block,) = part.blocks
    assert isinstance(block, Missing) and "has no checkpoint yet" in block.reason


def test_without_scikit_learn_the_map_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setattr("caco_fast.report.map.FEWEST", 5)
    found = {part.anchor: part for part in picture_parts(place / "simclr", PicturesConfig(), CPU)}
    (block,) = found["map"].blocks
    assert isinstance(block, Missing) and 'pip install "caco-fast[evaluate]"' in block.reason


def test_an_unexpected_error_leaves_the_other_parts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("made up\n    and more")

    monkeypatch.setattr("caco_fast.report.neighbours.nearest", fail)
    found = {part.anchor: part for part in picture_parts(place / "simclr", PicturesConfig(), CPU)}
    (block,) = found["neighbours"].blocks
    assert block == Missing("nearest neighbours: an unexpected error, RuntimeError: made up")
    assert isinstance(found["views"].blocks[0], Picture)


def test_one_rank_of_several_makes_them_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no group, so that any collective fails.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    monkeypatch.setattr("caco_fast.report.map.FEWEST", 5)
    parts = list(picture_parts(place / "caco", PicturesConfig(), CPU))
    assert not [block for part in parts for block in part.blocks if isinstance(block, Missing)]


def test_reading_ends_in_time() -> None:
    def batches() -> Iterator[int]:
        yield from range(5)

    loader: Any = batches()
    assert list(_Until(loader, time.monotonic() - 1)) == [0]
    loader = batches()
    assert list(_Until(loader, time.monotonic() + 1000)) == [0, 1, 2, 3, 4]


class Many:
    """A million images of which each is made when it is read, and counted."""

    classes = [f"class {n}" for n in range(1000)]
    channels, mean, std = 3, (0.5,) * 3, (0.5,) * 3
    read: set[int] = set()

    def __len__(self) -> int:
        return 1_281_167

    def image(self, index: int) -> np.ndarray:
        self.read.add(index)
        return np.full((32, 32, 3), index % 256, dtype=np.uint8)

    def label(self, index: int) -> int:
        return index % 1000

    def name(self, index: int) -> str:
        return str(index)

    def list_hash(self) -> str:
        return "many"


def test_a_million_images_are_sampled(place: Path) -> None:
    made = Sample(place / "caco", PicturesConfig(train_images=90, test_images=40), CPU)
    made.__dict__["train_source"] = source = Many()
    made.__dict__["test_source"] = source
    seen = made.train.index.sort().values
    assert len(seen) == 90 and len(source.read) <= 90 + 1
    assert float(seen[0]) < 30_000 and float(seen[-1]) > 1_250_000
    assert not set(made.test.index.tolist()) & set(seen.tolist()) and len(made.test.index) == 40
    # Ten classes alone, so that a map of 40 images shows some of each.
    assert len(made.map.labels.unique()) == 10 and len(made.map.index) == 40


@pytest.mark.parametrize("name", ["train_images", "test_images", "seconds", "checkpoints"])
def test_settings_out_of_range_are_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"pictures.{name}: found 0, expected at least"):
        PicturesConfig(**{name: 0})
