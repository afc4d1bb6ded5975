"""The linear probe finds the minimum of its loss, and the accuracy that a linear classifier can reach.

Legend: N training rows, D feature size.
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caco_fast.data import DataConfig, build_source
from caco_fast.distributed import rank, world_size
from caco_fast.errors import UserError
from caco_fast.evaluate import linear_probe, solvers
from caco_fast.evaluate import rows as shards
from tests.ranks import run_ranks

module = sys.modules["caco_fast.evaluate.linear_probe"]


def blobs(count: int, dim: int = 8, classes: int = 4, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, dim, generator=generator), labels


def standardised(features: Tensor, labels: Tensor) -> shards.Rows:
    return shards.Rows(features, labels, shards.coordinates(features, standardise=True))


def rotated(features: Tensor, at: shards.Coordinates) -> Tensor:  # [N, D + 1] f64
    """The standardised features in the coordinates of a fit, and a 1 for the bias."""
    x = (features - features.mean(0)) / features.std(0, correction=0)
    rotation = at.matrix * features.double().std(0, correction=0).unsqueeze(1)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(len(rotation), dtype=torch.float64))
    return F.pad(x.double() @ rotation, (0, 1), value=1.0)


def test_loss_and_gradient_over_blocks_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 64)
    features, labels = blobs(201)
    rows = standardised(3 * features + 1, labels)
    weight = torch.randn(4, 9)
    found = solvers.loss_and_gradient(rows, weight, 0.03, 201)
    exact = weight.double().requires_grad_()
    x = rotated(3 * features + 1, rows.at)
    loss = F.cross_entropy(x @ exact.T, labels) + 0.03 / 2 * exact[:, :-1].square().sum()
    for value, wanted in zip(found, (loss, *torch.autograd.grad(loss, exact)), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_penalised_loss_vanishes_at_the_solution() -> None:
    features, labels = blobs(300)
    rows = standardised(features, labels)
    weight = next(solvers.logistic_path(rows, 4, [0.03])).weight.double().requires_grad_()
    loss = F.cross_entropy(rotated(features, rows.at) @ weight.T, labels) + 0.03 / 2 * weight[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-4


def test_accuracy_on_blobs_is_near_the_best_possible() -> None:
    train, labels = blobs(2000)
    test, answers = blobs(2000, seed=1)
    centres = torch.stack([train[labels == label].mean(0) for label in range(4)])
    best = 100 * (torch.cdist(test, centres).argmin(1) == answers).float().mean().item()
    found = linear_probe(train, labels, test, answers, classes=4)
    assert 60 < best < 99
    assert found > best - 1.0


def test_scale_and_shift_of_the_features_do_not_matter() -> None:
    (train, labels), (test, answers) = blobs(400), blobs(400, seed=1)
    scale, shift = torch.logspace(-3, 3, 8), torch.linspace(-50, 50, 8)
    plain = linear_probe(train, labels, test, answers, classes=4, l2=0.01)
    moved = linear_probe(train * scale + shift, labels, test * scale + shift, answers, classes=4, l2=0.01)
    assert moved == pytest.approx(plain, abs=0.6)


def test_constant_and_dead_features_are_harmless() -> None:
    (train, labels), (test, answers) = blobs(400), blobs(400, seed=1)
    plain = linear_probe(train, labels, test, answers, classes=4, l2=0.01)
    dead = [torch.cat([rows, torch.full((400, 1), 0.1), torch.zeros(400, 1)], 1) for rows in (train, test)]
    assert linear_probe(dead[0], labels, dead[1], answers, classes=4, l2=0.01) == pytest.approx(plain, abs=0.3)


def test_result_is_deterministic() -> None:
    (train, labels), (test, answers) = blobs(300), blobs(300, seed=1)
    found = {linear_probe(train, labels, test, answers, classes=4) for _ in range(3)}
    assert len(found) == 1


def test_penalty_is_chosen_on_rows_held_out() -> None:
    # Labels that nothing tells need a strong penalty; many rows in few dimensions, with sharp borders, a weak one.
    noisy, labels = blobs(60, dim=400)
    labels = labels[torch.randperm(60)]
    places = torch.arange(4000)
    assert module._choose_penalty(standardised(noisy, labels), places[:60], 4, 100)[0] == module.PENALTIES[0]
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(4000, 2, generator=generator)
    stripes = (fine[:, 0] * 6).long()
    assert module._choose_penalty(standardised(fine, stripes), places, 6, 200)[0] == module.PENALTIES[-1]


def test_no_gradient_context_of_the_caller_is_no_obstacle() -> None:
    (train, labels), (test, answers) = blobs(100), blobs(100, seed=1)
    with torch.no_grad():
        found = linear_probe(train, labels, test, answers, classes=4, l2=0.1)
    assert found > 50


def test_few_rows_are_enough() -> None:
    train, labels = blobs(5)
    assert 0 <= linear_probe(train, labels, train, labels, classes=4) <= 100


def test_features_that_are_not_finite_are_refused() -> None:
    train, labels = blobs(50)
    train[0, 0] = math.nan
    with pytest.raises(UserError, match="linear probe: some features are NaN"):
        linear_probe(train, labels, train, labels, classes=4)


def test_no_rows_are_refused() -> None:
    train, labels = blobs(50)
    with pytest.raises(UserError, match="found 50 training and 0 test images"):
        linear_probe(train, labels, train[:0], labels[:0], classes=4)


def test_raw_pixels_of_fashion_mnist_give_the_known_figure() -> None:
    rows: list[Tensor] = []
    for split in ("train", "test"):
        source = build_source(DataConfig(source="embedded"), split)
        rows.append(torch.stack([torch.as_tensor(source.image(i)).flatten().float() for i in range(len(source))]))
        rows.append(torch.tensor([source.label(i) for i in range(len(source))]))
    # 83.3 was measured elsewhere on 10,000 test images; the 2,000 here have a standard error of 0.8.
    assert linear_probe(*rows, classes=10, l2=0.01) == pytest.approx(83.3, abs=1.6)


class LargestResult(TorchDispatchMode):
    """A context that notes the bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = func in (torch.ops.aten.split.Tensor, torch.ops.aten.slice.Tensor, torch.ops.aten.detach.default)
        for tensor in tree_leaves(result) if not views else ():
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def shared() -> float:
    """The figure of this rank, whose share has other rows than a cut in order would give."""
    (train, labels), (test, answers) = blobs(301), blobs(200, seed=1)
    own = torch.arange(301) % world_size() == rank()
    index = torch.arange(301)[own]
    return linear_probe(
        train[own], labels[own], test.chunk(world_size())[rank()], answers.chunk(world_size())[rank()], classes=4,
        train_index=index,
    )  # fmt: skip


def test_ranks_with_a_share_each_find_what_one_finds() -> None:
    alone = shared()
    assert run_ranks(shared, 3) == [alone] * 3


def test_features_of_16_bits_are_read_without_an_f32_copy_of_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 512)
    monkeypatch.setattr(shards, "AT_ONCE", 2**16)
    train, labels = blobs(40_000, dim=128)
    rows = train.bfloat16()
    plain = linear_probe(rows.float(), labels, rows[:1000].float(), labels[:1000], classes=4, l2=0.01, max_iter=3)
    with LargestResult() as largest:
        found = linear_probe(rows, labels, rows[:1000], labels[:1000], classes=4, l2=0.01, max_iter=3)
    assert found == plain
    # In f64, for the deviations.
    assert largest.bytes <= 512 * 128 * 8
