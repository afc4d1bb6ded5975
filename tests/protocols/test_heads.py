"""Heads against torch's own layers and optimisers, one learning rate at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caco_fast.protocols.head_training import LinearRecipe
from caco_fast.protocols.heads import Heads

CLASSES, DIM = 4, 7
LRS = [0.01, 0.3, 2.0]


def made_up(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    features = torch.randn(count, DIM, generator=generator, dtype=torch.float64) + F.one_hot(labels, DIM)
    return features, labels


def heads(lrs: list[float], **settings) -> Heads:
    recipe = LinearRecipe(**settings)
    return Heads(DIM, CLASSES, lrs, recipe, seed=3, device=torch.device("cpu"), dtype=torch.float64)


def larc_step(layer: nn.Linear, velocities: list[Tensor], lr: float, recipe: LinearRecipe) -> None:
    """LARC of Apex with clip off, tensor by tensor, with numbers of the host."""
    for value, velocity in zip((layer.weight, layer.bias), velocities):
        grad = value.grad + recipe.weight_decay * value.data
        norm, of_grad = float(value.data.norm()), float(value.grad.norm())
        if norm > 0 and of_grad > 0 and (value.ndim == 2 or recipe.trust_bias):
            grad *= recipe.trust * norm / (of_grad + recipe.weight_decay * norm + 1e-8)
        velocity.mul_(recipe.momentum).add_(grad)
        value.data -= lr * velocity


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": True, "weight_decay": 1e-2},
        {"norm": True},
        {"optimizer": "larc", "trust": 0.1},
        {"optimizer": "larc", "trust": 0.1, "trust_bias": True, "weight_decay": 1e-2},
    ],
)
def test_each_head_trains_as_a_layer_of_torch_alone(settings):
    several = heads(LRS, **settings)
    recipe = several.recipe
    for number, lr in enumerate(LRS):
        layer = nn.Linear(DIM, CLASSES, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(heads([lr], **settings).weight[0])
            layer.bias.zero_()
        norm = nn.BatchNorm1d(DIM, affine=False, dtype=torch.float64) if recipe.norm else nn.Identity()
        sgd = torch.optim.SGD(
            layer.parameters(), lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
        )
        velocities = [torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)]
        fresh = heads(LRS, **settings)
        for step, factor in enumerate((1.0, 0.5, 0.25, 0.1)):
            features, labels = made_up(13, step)
            loss = F.cross_entropy(layer(norm(features)), labels)
            layer.zero_grad()
            loss.backward()
            if recipe.optimizer == "larc":
                larc_step(layer, velocities, lr * factor, recipe)
            else:
                sgd.param_groups[0]["lr"] = lr * factor
                sgd.step()
            found = fresh.step(features, labels, factor, 13)[number]
            torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fresh.weight[number], layer.weight.detach(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(fresh.bias[number], layer.bias.detach(), rtol=1e-11, atol=1e-12)
        features, labels = made_up(50, 9)
        norm.eval()
        top = layer(norm(features)).topk(2).indices == labels.view(-1, 1)
        assert fresh.accuracy(features, labels)[0, number] == pytest.approx(100 * top[:, 0].double().mean().item())


def test_a_head_that_diverges_leaves_the_others_alone():
    with_bad, without = heads([0.1, 1e308, 0.5]), heads([0.1, 0.5])
    for step in range(5):
        features, labels = made_up(13, step)
        losses = with_bad.step(features, labels, 1.0, 13)
        without.step(features, labels, 1.0, 13)
    assert not losses[1].isfinite()
    torch.testing.assert_close(with_bad.weight[[0, 2]], without.weight, rtol=1e-12, atol=1e-12)


def test_heads_that_say_the_same_of_all_classes_score_no_better_than_guessing():
    some = heads([0.1])
    some.weight.zero_()
    features, labels = made_up(40, 0)
    assert some.accuracy(features, labels)[0, 0] < 60
