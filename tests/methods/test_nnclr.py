"""NNCLR against loops: neighbour, predictor, loss, queue and pointer, step by step.

Legend: B images, K queue rows, C channels, H width of the predictor.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.errors import UserError
from caco_fast.methods.nnclr import NNCLR, NNCLRConfig
from tests.methods.stand_ins import ScriptedEncoders


def make(dim: int = 6, **settings: Any) -> NNCLR:
    method = NNCLR(NNCLRConfig(**{"queue_size": 11, "predictor_hidden": 7, **settings}), dim).double()
    method.queue.queue.copy_(normalize(method.queue.queue, dim=1))
    return method


def unit(count: int, dim: int) -> Tensor:
    return normalize(torch.randn(count, dim, dtype=torch.float64), dim=1)


def predict(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Linear, BatchNorm with the batch's statistics, ReLU, Linear, and unit length."""
    hidden = rows @ weights["0.weight"].T + weights["0.bias"]
    centred = hidden - hidden.sum(dim=0) / len(rows)
    deviation = (centred.square().sum(dim=0) / len(rows) + 1e-5).sqrt()
    active = (centred / deviation * weights["1.weight"] + weights["1.bias"]).clamp(min=0)
    out = active @ weights["3.weight"].T + weights["3.bias"]
    return out / out.square().sum(dim=1, keepdim=True).sqrt()


def nearest(row: Tensor, queue: list[list[float]]) -> Tensor:
    values = row.tolist()
    similarities = [sum(x * y for x, y in zip(values, key)) for key in queue]
    return torch.tensor(queue[similarities.index(max(similarities))], dtype=torch.float64)


def half(anchors: list[Tensor], predictions: Tensor, t: float) -> tuple[Tensor, float]:
    losses, shares = [], []
    for i, anchor in enumerate(anchors):
        scores = [(anchor * p).sum() / t for p in predictions]
        total = torch.stack([score.exp() for score in scores]).sum()
        losses.append(total.log() - scores[i])
        shares.append((scores[i].exp() / total).item())
    return torch.stack(losses).mean(), sum(shares) / len(shares)


@pytest.mark.parametrize(
    "images, size, dim, t", [(4, 11, 6, 0.1), (5, 3, 4, 0.3), (3, 8, 5, 0.07)], ids=["", "queue < batch", "odd"]
)
def test_loss_gradients_and_queue_over_three_steps(images: int, size: int, dim: int, t: float) -> None:
    method, encoders = make(dim, queue_size=size, temperature=t), ScriptedEncoders(dim)
    queue, pointer = method.queue.queue.tolist(), 0
    parameters = dict(method.predictor.named_parameters())
    for _ in range(3):
        views = [unit(images, dim).requires_grad_() for _ in range(2)]
        output = method(views, encoders)
        p_a, p_b = (predict(parameters, view) for view in views)
        of_a, of_b = ([nearest(row, queue) for row in view] for view in views)
        forth, back = half(of_a, p_b, t), half(of_b, p_a, t)
        wanted = (forth[0] + back[0]) / 2
        torch.testing.assert_close(output.loss, wanted, rtol=0, atol=1e-12)
        assert float(output.metrics["positive_probability"]) == pytest.approx((forth[1] + back[1]) / 2, abs=1e-12)
        inputs = [*views, *parameters.values()]
        for ours, theirs in zip(torch.autograd.grad(output.loss, inputs), torch.autograd.grad(wanted, inputs)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        # The search came before the rows that enter now.
        method.update(output.rows, 0.5)
        for row in views[0].tolist():
            queue[pointer % size] = row
            pointer += 1
        assert torch.equal(method.queue.queue, torch.tensor(queue, dtype=torch.float64))
        assert int(method.queue.pointer) == pointer % size
        with torch.no_grad():
            for value in parameters.values():
                value += 0.1 * torch.randn_like(value)
    assert encoders.calls == ["queries of 2"] * 3


def test_a_skipped_step_leaves_the_queue() -> None:
    method = make()
    before = method.queue.queue.clone()
    method.update((unit(4, 6),), 1.0, skip=torch.tensor(1.0))
    assert torch.equal(method.queue.queue, before) and int(method.queue.pointer) == 0


def test_the_queue_gets_no_gradient_and_the_predictor_does() -> None:
    method = make()
    method([unit(4, 6).requires_grad_() for _ in range(2)], ScriptedEncoders(6)).loss.backward()
    assert {name for name, value in method.named_parameters() if value.grad is not None} == {
        f"predictor.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    }
    assert not method.queue.queue.requires_grad


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"temperature": -1.0}, "nnclr.temperature: found -1.0, expected a number above 0"),
        ({"backend": "gpu"}, "nnclr.backend: found 'gpu', expected one of auto, reference, tiled, cuda"),
        ({"predictor_hidden": 0}, "nnclr.predictor_hidden: found 0, expected at least 1"),
        ({"queue_size": 0}, "the key queue: found size 0 and dim 6, expected at least 1 each"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        make(**settings)
    assert line in str(error.value)


@pytest.mark.parametrize("count", [1, 3])
def test_it_takes_two_views(count: int) -> None:
    make().check_views([224, 224])
    with pytest.raises(UserError, match=f"views: found {count} views of an image, expected 2 for nnclr"):
        make().check_views([224] * count)
