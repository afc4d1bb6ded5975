"""Weighted kNN agrees with a plain loop, and several ranks agree with one.

Legend: N training rows, M test rows, D feature size.
"""

import json
import logging
import math
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.evaluate import knn_accuracy, knn_scores

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
KS = [1, 5, 20]


def clusters(train: int, test: int, classes: int = 7, dim: int = 16, noise: float = 1.5, seed: int = 0) -> Rows:
    """Features [N, D] and labels [N] of both sets, with so much noise that neighbours disagree."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    labels = [torch.randint(classes, (count,), generator=generator) for count in (train, test)]
    features = [centres[label] + noise * torch.randn(len(label), dim, generator=generator) for label in labels]
    return features[0], labels[0], features[1], labels[1]


def ties(train: int, test: int, classes: int = 5, seed: int = 0) -> Rows:
    """Rows of +-1 in 16 dimensions: products are exact, norms are 4, and many rows share each similarity."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randint(2, (count, 16), generator=generator) * 2.0 - 1 for count in (train, test)]
    labels = [torch.randint(classes, (count,), generator=generator) for count in (train, test)]
    return features[0], labels[0], features[1], labels[1]


def by_loop(rows: Rows, k: int, classes: int, temperature: float, index: Tensor | None = None) -> float:
    """The accuracy in per cent, from sorted Python lists in double precision."""
    train, labels, test, answers = rows
    train, test = (part.double() / part.double().norm(dim=1, keepdim=True) for part in (train, test))
    index = list(range(len(train))) if index is None else index.tolist()
    correct = 0
    for query, answer in zip(test, answers.tolist()):
        similarity = (train @ query).tolist()
        nearest = sorted(range(len(train)), key=lambda row: (-similarity[row], index[row]))[:k]
        votes = [0.0] * classes
        for row in nearest:
            votes[labels[row]] += math.exp(similarity[row] / temperature)
        correct += votes.index(max(votes)) == answer
    return 100 * correct / len(test)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_equals_a_plain_loop(temperature: float) -> None:
    rows = clusters(211, 67)
    found = knn_accuracy(*rows, k=KS, classes=7, temperature=temperature)
    assert found == {k: pytest.approx(by_loop(rows, k, 7, temperature)) for k in KS}
    assert 30 < found[20] < 95


def places_by_loop(rows: Rows, k: int, classes: int, temperature: float) -> list[int]:
    """The number of classes before the right one for each test row, from sorted Python lists; k nearest rows vote."""
    train, labels, test, answers = rows
    train, test = (part.double() / part.double().norm(dim=1, keepdim=True) for part in (train, test))
    places = []
    for query, answer in zip(test, answers.tolist()):
        similarity = (train @ query).tolist()
        votes = [0.0] * classes
        for row in sorted(range(len(train)), key=lambda row: (-similarity[row], row))[:k]:
            votes[labels[row]] += math.exp(similarity[row] / temperature)
        order = sorted(range(classes), key=lambda label: (-votes[label], label))
        places.append(order.index(answer) if answer in order else classes)
    return places


@pytest.mark.parametrize("make", [clusters, ties], ids=["clusters", "ties"])
def test_one_search_serves_all_temperatures_and_the_first_five(make: Callable[..., Rows]) -> None:
    train, labels, test, answers = make(211, 67, classes=13)
    # A class that the training set does not have, and no class.
    answers[:4] = torch.tensor([13, 40, -1, -1])
    rows = (train, labels, test, answers)
    found = knn_scores(*rows, k=KS, classes=13, temperatures=[0.07, 0.5])
    assert len(found) == 2 * len(KS)
    for (k, temperature), (top1, top5) in found.items():
        places = places_by_loop(rows, k, 13, temperature)
        assert top1 == pytest.approx(100 * sum(place < 1 for place in places) / 67)
        assert top5 == pytest.approx(100 * sum(place < 5 for place in places) / 67)
    assert found[20, 0.5][0] < found[20, 0.5][1] < 100


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("make", [clusters, ties], ids=["clusters", "ties"])
def test_long_rows_in_several_blocks_give_the_neighbours_of_a_sort(
    make: Callable[..., Rows], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups, their remainder, and the bound of earlier blocks leave no neighbour out."""
    module = sys.modules["caco_fast.evaluate.knn"]
    monkeypatch.setattr(module, "ROWS", 97)
    monkeypatch.setattr(module, "PRODUCTS", 5)
    train, labels, test, _ = make(2003, 23)
    index = torch.randperm(2003, generator=torch.Generator().manual_seed(1))
    (found,) = module._neighbours(module._unit(test), train, index % 100, index, k)
    similarity = module._unit(test) @ module._unit(train).T
    keys = module._sortable(similarity, index)
    expected, place = keys.sort(dim=1, descending=True)
    torch.testing.assert_close(found[0], module._similarity(expected[:, :k]))
    assert (found[1] == (index % 100)[place[:, :k]]).float().mean() > (0.999 if make is ties else 0.95)


@pytest.mark.parametrize("shuffled", [False, True], ids=["in-order", "shuffled-index"])
def test_equal_similarities_go_to_the_lower_index(shuffled: bool) -> None:
    rows = ties(150, 60)
    index = torch.randperm(150, generator=torch.Generator().manual_seed(1)) if shuffled else None
    found = knn_accuracy(*rows, k=KS, classes=5, train_index=index)
    assert found == {k: pytest.approx(by_loop(rows, k, 5, 0.2, index)) for k in KS}


def test_tiles_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ties(150, 60)
    whole = knn_accuracy(*rows, k=KS, classes=5)
    monkeypatch.setattr(sys.modules["caco_fast.evaluate.knn"], "QUERIES", 7)
    monkeypatch.setattr(sys.modules["caco_fast.evaluate.knn"], "ROWS", 11)
    assert knn_accuracy(*rows, k=KS, classes=5) == whole


def test_sort_key_orders_all_floats_and_keeps_them() -> None:
    module = sys.modules["caco_fast.evaluate.knn"]
    values = torch.tensor([-1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0])
    index = torch.tensor([0, 2**32 - 1, 5, 6, 7, 1, 3, 2**31])
    keys = module._sortable(values[None], index)[0]
    # -0 and 0 are equal, so the lower index goes first.
    assert keys.argsort(descending=True).tolist() == [7, 6, 5, 3, 4, 2, 1, 0]
    assert torch.equal(module._similarity(keys), values)


def test_one_k_and_a_k_beyond_the_training_set(caplog: pytest.LogCaptureFixture) -> None:
    rows = clusters(30, 20)
    with caplog.at_level(logging.WARNING):
        found = knn_accuracy(*rows, k=200, classes=7)
    assert found == {200: pytest.approx(by_loop(rows, 30, 7, 0.2))}
    assert "k 200 is larger than the training set, 30 neighbours vote" in caplog.text


@pytest.mark.parametrize("k", [0, [5, -1], []], ids=["zero", "negative", "none"])
def test_k_below_one_is_refused(k: int | list[int]) -> None:
    with pytest.raises(ValueError, match="expected numbers of at least 1"):
        knn_accuracy(*clusters(30, 20), k=k, classes=7)


def test_features_that_are_not_finite_are_refused() -> None:
    train, labels, test, answers = clusters(30, 20)
    train[3, 2], test[1, 1] = math.nan, math.inf
    with pytest.raises(UserError, match="kNN: 2 images have features that are NaN or infinite"):
        knn_accuracy(train, labels, test, answers, k=5, classes=7)


def test_no_test_images_are_refused() -> None:
    train, labels, test, answers = clusters(30, 20)
    with pytest.raises(UserError, match="found 30 training and 0 test images"):
        knn_accuracy(train, labels, test[:0], answers[:0], k=5, classes=7)


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found = {}
    for name, (train, labels, test, answers), classes in cases():
        # The pattern gives shards of different sizes. One rank has fewer rows than k, or none.
        owner = (torch.arange(len(train)) ** 2 % 7) % world_size
        owner[owner == world_size - 1] = 0
        if name != "empty-shard":
            owner[-3:] = world_size - 1
        mine, test_owner = owner == rank, torch.arange(len(test)) % (world_size + 1) % world_size
        shard = (train[mine], labels[mine], test[test_owner == rank], answers[test_owner == rank])
        index = torch.arange(len(train))[mine]
        found[name] = knn_accuracy(*shard, k=[*KS, 500], classes=classes, train_index=index)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def cases() -> list[tuple[str, Rows, int]]:
    return [("clusters", clusters(211, 67), 7), ("ties", ties(150, 60), 5), ("empty-shard", ties(90, 40, seed=3), 5)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_give_the_figures_of_one(world_size: int, tmp_path: Path) -> None:
    alone = {name: knn_accuracy(*rows, k=[*KS, 500], classes=classes) for name, rows, classes in cases()}
    # Forked from a process that has done the imports, which cost more than the test.
    multiprocessing.set_forkserver_preload(["caco_fast.evaluate"])
    mp.start_processes(_rank, args=(world_size, str(tmp_path)), nprocs=world_size, start_method="forkserver")
    for rank in range(world_size):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {name: {str(k): score for k, score in scores.items()} for name, scores in alone.items()}


@pytest.mark.gpu
def test_gpu_gives_the_figures_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    rows = ties(3000, 500)
    on_gpu = knn_accuracy(*(part.cuda() for part in rows), k=KS, classes=5)
    assert on_gpu == knn_accuracy(*rows, k=KS, classes=5)
