"""MoCo v2 against a loop over queries, and its queue against a list.

Legend: B images, K queue rows, C channels.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.errors import UserError
from caco_fast.methods import MoCo, MoCoConfig
from tests.methods.stand_ins import ScriptedEncoders

B, K, C = 4, 10, 6


def unit(rows: int = B) -> Tensor:
    return normalize(torch.randn(rows, C, dtype=torch.float64), dim=1)


def make(**settings: Any) -> MoCo:
    method = MoCo(MoCoConfig(**{"queue_size": K, "temperature": 0.2, **settings}), C).double()
    # Unit rows in f64 too.
    method.queue.queue.copy_(normalize(method.queue.queue, dim=1))
    return method


def by_hand(queries: Tensor, keys: Tensor, queue: Tensor, t: float) -> tuple[float, float, list[list[float]]]:
    """Loss, mean probability of the key, and the gradient of the loss in each query, term by term."""
    losses, probabilities, gradient = [], [], []
    for q, k in zip(queries.tolist(), keys.tolist()):
        rows = [k, *queue.tolist()]
        logits = [math.fsum(a * b for a, b in zip(q, row)) / t for row in rows]
        total = math.fsum(map(math.exp, logits))
        p = [math.exp(x) / total for x in logits]
        losses.append(math.log(total) - logits[0])
        probabilities.append(p[0])
        mean = [math.fsum(weight * row[c] for weight, row in zip(p, rows)) for c in range(C)]
        gradient.append([(mean[c] - k[c]) / (t * len(queries)) for c in range(C)])
    return sum(losses) / len(queries), sum(probabilities) / len(queries), gradient


def close(found: Tensor, wanted: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


def test_one_way_loss_gradient_and_queue_over_several_steps() -> None:
    method, encoders = make(), ScriptedEncoders(C)
    queue = method.queue.queue.tolist()
    for step in range(5):
        views = [unit().requires_grad_(), unit().requires_grad_()]
        output = method(views, encoders)
        assert encoders.calls[-2:] == ["queries of 1", "keys of 1"]
        keys = encoders.key_of(views[1])
        loss, probability, gradient = by_hand(views[0], keys, torch.tensor(queue, dtype=torch.float64), 0.2)
        output.loss.backward()
        close(output.loss, loss)
        close(output.metrics["positive_probability"], probability)
        close(views[0].grad, gradient)
        assert views[1].grad is None
        method.update(output.rows, 0.5)
        for i, key in enumerate(keys.tolist()):
            queue[(step * B + i) % K] = key
        close(method.queue.queue, queue)


@pytest.mark.parametrize("size, batch, t", [(K, B, 0.2), (7, 3, 0.03), (1, 1, 0.12), (3, 2, 0.14)])
def test_symmetric_loss_gradients_and_queue_over_several_steps(size: int, batch: int, t: float) -> None:
    """The sum of both ways over the old queue; then both keys enter it, view a's first."""
    method = make(symmetric=True, queue_size=size, temperature=t)
    encoders = ScriptedEncoders(C)
    queue, entered = method.queue.queue.tolist(), 0
    for _ in range(4):
        views = [unit(batch).requires_grad_(), unit(batch).requires_grad_()]
        output = method(views, encoders)
        assert encoders.calls[-2:] == ["queries of 2", "keys of 2"]
        k_a, k_b = encoders.key_of(views[0]), encoders.key_of(views[1])
        old = torch.tensor(queue, dtype=torch.float64)
        forth, back = by_hand(views[0], k_b, old, t), by_hand(views[1], k_a, old, t)
        output.loss.backward()
        close(output.loss, forth[0] + back[0])
        close(output.metrics["positive_probability"], (forth[1] + back[1]) / 2)
        close(views[0].grad, forth[2])
        close(views[1].grad, back[2])
        method.update(output.rows, 1.0)
        for key in [*k_a.tolist(), *k_b.tolist()]:
            queue[entered % size] = key
            entered += 1
        close(method.queue.queue, queue)
        assert int(method.queue.pointer) == entered % size


def test_training_is_the_only_phase() -> None:
    (phase,) = make().phases(256)
    assert (phase.name, phase.steps) == ("training", None)


def test_state_dict_goes_on() -> None:
    encoders = ScriptedEncoders(C)
    straight, resumed = make(), make()
    straight.update(straight([unit(), unit()], encoders).rows, 1.0)
    resumed.load_state_dict(straight.state_dict())
    views = [unit(), unit()]
    for method in (straight, resumed):
        method.update(method(views, encoders).rows, 1.0)
    assert torch.equal(straight.queue.queue, resumed.queue.queue)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"temperature": 0.0}, "moco.temperature: found 0.0, expected a number above 0"),
        ({"backend": "gpu"}, "moco.backend: found 'gpu', expected one of auto, reference, tiled, cuda"),
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
    with pytest.raises(UserError, match=f"views: found {count} views of an image, expected 2 for moco"):
        make().check_views([224] * count)
