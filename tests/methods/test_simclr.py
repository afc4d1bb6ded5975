"""SimCLR and the one-way InfoNCE against loops over pairs of rows.

Legend: B images, C channels, t temperature.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.errors import UserError
from caco_fast.methods import Method
from caco_fast.methods.simclr import InfoNCE, InfoNCEConfig, SimCLR, SimCLRConfig
from tests.methods.stand_ins import ScriptedEncoders

MAKES = {"simclr": (SimCLR, SimCLRConfig), "infonce": (InfoNCE, InfoNCEConfig)}


def make(name: str, t: float, dim: int = 6) -> Method:
    method, config = MAKES[name]
    return method(config(temperature=t), dim)


def unit(count: int, dim: int) -> Tensor:
    return normalize(torch.randn(count, dim, dtype=torch.float64), dim=1)


def loss_of(query: Tensor, positive: Tensor, candidates: list[Tensor], t: float) -> tuple[Tensor, float]:
    """- log of the share of the positive among the candidates, and that share."""
    total = torch.stack([torch.exp((query * row).sum() / t) for row in candidates]).sum()
    own = (query * positive).sum() / t
    return torch.log(total) - own, float((torch.exp(own) / total).detach())


def by_hand(name: str, a: Tensor, b: Tensor, t: float) -> tuple[Tensor, float]:
    found = []
    if name == "infonce":
        found = [loss_of(query, b[i], list(b), t) for i, query in enumerate(a)]
    else:
        for i in range(len(a)):
            others = [row for n in range(len(a)) if n != i for row in (a[n], b[n])]
            found += [loss_of(a[i], b[i], [b[i], *others], t), loss_of(b[i], a[i], [a[i], *others], t)]
    losses, shares = zip(*found)
    return torch.stack(losses).mean(), sum(shares) / len(shares)


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("images, dim, t", [(5, 6, 0.1), (4, 3, 0.5), (1, 4, 0.2), (7, 5, 1.3)])
def test_loss_and_gradients_over_three_steps(name: str, images: int, dim: int, t: float) -> None:
    method, encoders = make(name, t, dim), ScriptedEncoders(dim)
    for _ in range(3):
        views = [unit(images, dim).requires_grad_() for _ in range(2)]
        output = method(views, encoders)
        wanted, share = by_hand(name, *views, t)
        torch.testing.assert_close(output.loss, wanted, rtol=0, atol=1e-12)
        assert float(output.metrics["positive_probability"]) == pytest.approx(share, abs=1e-12)
        found = torch.autograd.grad(output.loss, views)
        for ours, theirs in zip(found, torch.autograd.grad(wanted, views), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        assert output.rows == ()
    assert encoders.calls == ["queries of 2"] * 3
    assert not method.state_dict() and not list(method.parameters())


@pytest.mark.parametrize("name", MAKES)
def test_the_adversarial_loss_is_that_of_anchor_and_changed_image(name: str) -> None:
    method, views = make(name, 0.3), [unit(5, 6) for _ in range(2)]
    embeddings = method.embed(views, ScriptedEncoders(6))
    anchor, other = unit(5, 6).requires_grad_(), unit(5, 6).requires_grad_()
    found, wanted = method.adversarial_loss(embeddings, anchor, other), by_hand(name, anchor, other, 0.3)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    pairs = zip(torch.autograd.grad(found, [anchor, other]), torch.autograd.grad(wanted, [anchor, other]))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_with_one_image_only_the_other_view_is_left() -> None:
    views = [unit(1, 6).requires_grad_() for _ in range(2)]
    output = make("simclr", 0.1)(views, ScriptedEncoders(6))
    assert output.loss == 0 and torch.autograd.grad(output.loss, views)[0].isfinite().all()


@pytest.mark.parametrize("name", MAKES)
def test_bad_settings_and_views_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}.temperature: found 0.0, expected a number above 0"):
        make(name, 0.0)
    make(name, 0.1).check_views([32, 32])
    with pytest.raises(UserError, match=f"views: found 3 views of an image, expected 2 for {name}"):
        make(name, 0.1).check_views([32, 32, 32])


@pytest.mark.parametrize("name", MAKES)
def test_no_key_encoder_is_asked_for(name: str) -> None:
    settings: Any = MAKES[name][1]()
    assert not MAKES[name][0].needs(settings, {}).key_encoder
