"""The sheets of neighbours and surrogates and the t-SNE picture: their figures against loops, and what is drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from caco_fast.data import ArraySource, DataConfig, Source, build_eval_loader
from caco_fast.distributed import rank, world_size
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.errors import UserError
from caco_fast.models import build_encoder_pair
from caco_fast.pretrained import open_source
from caco_fast.protocols import Context, FeatureSet, Result, registered
from caco_fast.protocols.neighbours import NeighboursConfig
from caco_fast.protocols.sheet import CELL, FRAME, RIGHT, WRONG
from caco_fast.protocols.surrogates import SurrogatesConfig
from caco_fast.protocols.tsne import TsneConfig, kept
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images
from tests.ranks import run_ranks


def rows_and_labels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of three classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 7, generator=generator) + 2 * F.one_hot(labels, 7), labels


def source_of(labels: Tensor) -> ArraySource:
    images = (labels * 80).numpy().astype(np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    return ArraySource("made up", images, labels.numpy(), ["a", "b", "c"], (0.5,), (0.5,))


class MadeUp:
    """A context whose features are given, of which every rank has a share of its own."""

    def __init__(self, folder: Path, train: int = 90, test: int = 41) -> None:
        self.folder, self.device, self.seed = folder, torch.device("cpu"), 0
        self.sets = {"train": rows_and_labels(train, 1), "test": rows_and_labels(test, 2)}
        self.pretrained = type("Pretrained", (), {"title": "made up"})()

    def features(self, split: str, data: DataConfig | None = None, source: Source | None = None) -> FeatureSet:
        features, labels = self.sets[split]
        # The first rank has one row, fewer than k.
        bounds = [0, 1, *(len(labels) * (r + 2) // (world_size() + 1) for r in range(1, world_size() - 1)), len(labels)]
        own = slice(bounds[rank()], bounds[rank() + 1]) if world_size() > 1 else slice(None)
        index = torch.arange(len(labels))
        return FeatureSet(features[own], labels[own], index[own], source_of(labels))


def run(name: str, context: MadeUp | Context, settings: object) -> Result:
    return registered(name).run(context, settings)  # type: ignore[arg-type]


def share_by_loops(context: MadeUp, k: int) -> float:
    (train, labels), (test, answers) = context.sets["train"], context.sets["test"]
    right = 0
    for query, answer in zip(test, answers):
        similarity = [float(F.cosine_similarity(query, row, dim=0)) for row in train]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
        right += sum(int(labels[i] == answer) for i in nearest)
    return 100 * right / (k * len(test))


def test_neighbours_are_those_of_a_loop(tmp_path: Path) -> None:
    context = MadeUp(tmp_path)
    result = run("neighbours", context, NeighboursConfig(queries=5, k=4))
    assert result.metrics == {"same_class_of_4": pytest.approx(share_by_loops(context, 4))}


def test_the_sheet_frames_neighbours_by_their_class(tmp_path: Path) -> None:
    context = MadeUp(tmp_path)
    run("neighbours", context, NeighboursConfig(queries=41, k=4))
    pixels = np.asarray(Image.open(tmp_path / "neighbours.png"))
    counts = [(pixels == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(2).sum() for colour in (RIGHT, WRONG)]
    frame = (CELL + 2 * FRAME) ** 2 - CELL**2
    assert sum(counts) == frame * 41 * 4
    assert counts[0] / sum(counts) == pytest.approx(share_by_loops(context, 4) / 100)


def neighbours_on_ranks(folder: str) -> dict[str, float]:
    return run("neighbours", MadeUp(Path(folder)), NeighboursConfig(queries=5, k=4)).metrics


@pytest.mark.parametrize("ranks", [2, 3])
def test_neighbours_of_several_ranks_are_those_of_one(ranks: int, tmp_path: Path) -> None:
    alone = neighbours_on_ranks(str(tmp_path))
    sheet = (tmp_path / "neighbours.png").read_bytes()
    assert run_ranks(neighbours_on_ranks, ranks, str(tmp_path)) == [alone] * ranks
    assert (tmp_path / "neighbours.png").read_bytes() == sheet


def test_fewer_images_than_neighbours(tmp_path: Path) -> None:
    result = run("neighbours", MadeUp(tmp_path, train=3, test=2), NeighboursConfig())
    assert list(result.metrics) == ["same_class_of_3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, with its images beside it."""
    place = tmp_path_factory.mktemp("run")
    train(config(write_images(place / "images"), "trainer.max_steps=2", "evaluation.every_epochs=0"), place / "a")
    return place


def surrogates_of(folder: str, out: str) -> dict[str, float]:
    place = Path(folder)
    settings = dict(device=torch.device("cpu"), autocast=None, batch_size=7, seed=0, folder=Path(out))
    context = Context(open_source(str(place / "a")), config(place / "images").data, **settings)
    return run("surrogates", context, SurrogatesConfig(queries=3)).metrics


def test_surrogates_are_the_images_nearest_to_the_rows(trained: Path, tmp_path: Path) -> None:
    found = surrogates_of(str(trained), str(tmp_path))
    assert (tmp_path / "surrogates.png").is_file()
    # Once more in f64, from the checkpoint alone, by loops over rows and images.
    store = CheckpointStore(trained / "a" / "checkpoints")
    state = store.load(store.latest())
    (bank,) = (value for name, value in state["method"].items() if name.endswith(".bank"))
    encoder = build_encoder_pair(
        *(getattr(config(trained), name) for name in ("backbone", "projector")), 3
    ).query.eval()
    encoder.load_state_dict(
        {k.removeprefix("query."): v for k, v in state["encoders"].items() if k.startswith("query.")}
    )
    rows, labels = {}, {}
    for split in ("train", "test"):
        (batch,) = build_eval_loader(config(trained / "images").data, split, batch_size=100)
        rows[split], labels[split] = encoder(batch[0])[0].detach().double(), batch[1].tolist()
    bank = F.normalize(bank.double(), dim=1)
    surrogate = [max(range(40), key=lambda i: float(row @ rows["train"][i])) for row in bank]
    positives = [max(range(len(bank)), key=lambda j: float(bank[j] @ query)) for query in rows["test"]]
    right = [labels["train"][surrogate[j]] == answer for j, answer in zip(positives, labels["test"])]
    by_chance = [labels["train"][i] == answer for i in surrogate for answer in labels["test"]]
    assert found == {
        "surrogate_has_class": pytest.approx(100 * sum(right) / len(right)),
        "random_row_has_class": pytest.approx(100 * sum(by_chance) / len(by_chance)),
        "rows_chosen": len(set(positives)),
    }


def test_surrogates_of_two_ranks_are_those_of_one(trained: Path, tmp_path: Path) -> None:
    alone = surrogates_of(str(trained), str(tmp_path))
    assert run_ranks(surrogates_of, 2, str(trained), str(tmp_path)) == [alone] * 2


@pytest.mark.parametrize("source, line", [("random:resnet18", "has no bank, expected a run"), ("moco", "method moco")])
def test_surrogates_need_a_learned_bank(source: str, line: str, trained: Path, tmp_path: Path) -> None:
    if source == "moco":
        settings = config(trained / "images", "method=moco", "trainer.max_steps=1", "evaluation.every_epochs=0")
        train(settings, tmp_path / "moco")
        source = str(tmp_path / "moco")
    settings = dict(device=torch.device("cpu"), autocast=None, batch_size=7, seed=0, folder=tmp_path)
    context = Context(open_source(source), config(trained / "images").data, **settings)
    with pytest.raises(UserError, match=line):
        run("surrogates", context, SurrogatesConfig())


def test_tsne_draws_and_counts(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    result = run("tsne", MadeUp(tmp_path, test=60), TsneConfig(points=45, perplexity=8))
    assert Image.open(tmp_path / "tsne.png").width > 800
    again = run("tsne", MadeUp(tmp_path, test=60), TsneConfig(points=45, perplexity=8))
    assert again.metrics == result.metrics
    # A picture by chance would have a third.
    assert 45 < result.metrics["same_class_of_10"] < 100


def test_the_figure_of_a_picture_counts_near_points() -> None:
    points = torch.tensor([[float(i), 0.0] for i in range(11)] + [[100.0 + i, 0.0] for i in range(11)])
    labels = torch.tensor([0] * 11 + [1] * 11)
    assert kept(points, labels) == 100.0
    labels[0] = 1
    # The other ten of its group have one wrong neighbour, and it has ten.
    assert kept(points, labels) == pytest.approx(100 * (1 - 20 / 220))


def test_too_few_points_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tsne.points: found 41 test images of 10 classes, expected at least 90"):
        run("tsne", MadeUp(tmp_path), TsneConfig(points=2000))


@pytest.mark.parametrize(
    "make, line",
    [
        (lambda: NeighboursConfig(k=0), "neighbours.k"),
        (lambda: NeighboursConfig(queries=0), "neighbours.queries"),
        (lambda: SurrogatesConfig(queries=0), "surrogates.queries"),
        (lambda: TsneConfig(classes=21), "tsne.classes: found 21, expected 1 to 20"),
        (lambda: TsneConfig(points=60, perplexity=30), "tsne.perplexity: found 30, expected 1 to 20"),
    ],
)
def test_settings_out_of_range_are_one_line(make: object, line: str) -> None:
    with pytest.raises(UserError, match=line):
        make()  # type: ignore[operator]
