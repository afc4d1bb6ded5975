"""The CaCo method: what it asks of the encoders, how its bank is filled and stepped.

Legend: B images, K bank rows, C channels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.errors import UserError
from caco_fast.methods import CaCo, CaCoConfig
from tests.methods import caco_oracle as oracle
from tests.methods.stand_ins import ScriptedEncoders, small_pair

B, K, C = 4, 10, 6


def unit(rows: int = B) -> Tensor:
    return normalize(torch.randn(rows, C), dim=1)


def make(**settings: Any) -> CaCo:
    return CaCo(
        CaCoConfig(**{"bank_size": K, "temperature": 0.1, "bank_temperature": 0.07, "bank_lr": 0.5, **settings}), C
    )


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_step_asks_for_all_queries_then_two_keys(count: int) -> None:
    method, encoders = make(), ScriptedEncoders(C)
    views = [unit() for _ in range(count)]
    output = method(views, encoders)
    assert encoders.calls == [f"queries of {count}", "keys of 2"]
    keys = [encoders.key_of(view).double() for view in views[:2]]
    wanted = oracle.loss([v.double() for v in views], keys, method.bank.bank.double(), 0.1)
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=0)
    assert set(output.metrics) == {"positive_probability", "positive_perplexity"}


@pytest.mark.parametrize("warmup", [0.25, 1.0])
def test_update_steps_the_bank_at_the_warmed_lr(warmup: float) -> None:
    method, encoders = make(), ScriptedEncoders(C)
    views, before = [unit(), unit()], method.bank.bank.clone()
    method(views, encoders)
    method.update(warmup)
    keys = [encoders.key_of(view).double() for view in views]
    gradient = oracle.bank_gradient([v.double() for v in views], keys, before.double(), 0.07)
    torch.testing.assert_close(method.bank.velocity.double(), gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.bank.bank, before - 0.5 * warmup * method.bank.velocity)


@pytest.mark.parametrize("size, batch, steps", [(10, 4, 3), (12, 4, 3), (3, 4, 1), (65536, 1024, 64)])
def test_preparation_lasts_until_the_bank_is_full(size: int, batch: int, steps: int) -> None:
    assert make(bank_size=size).preparation_steps(batch) == steps
    assert make(bank_size=size, warm_start_steps=7).preparation_steps(batch) == 7


def test_preparation_fills_successive_rows_with_successive_keys() -> None:
    method, encoders = make(), ScriptedEncoders(C)
    random, keys = method.bank.bank.clone(), []
    for step in range(method.preparation_steps(B)):
        views = [unit(), unit()]
        method.prepare(views, encoders)
        assert encoders.calls[-2:] == ["queries of 1", "keys of 1"]
        method.update(0.3)
        keys.append(encoders.key_of(views[1]))
        full = min(K, B * (step + 1))
        torch.testing.assert_close(method.bank.bank[:full], torch.cat(keys)[:full])
        assert torch.equal(method.bank.bank[full:], random[full:])
    assert method.bank.velocity.abs().sum() == 0
    method.finish_preparation(encoders)
    assert encoders.calls[-1] == "copy"


def test_a_longer_preparation_goes_on_as_a_queue() -> None:
    method, encoders = make(warm_start_steps=5), ScriptedEncoders(C)
    batches = []
    for _ in range(5):
        views = [unit(), unit()]
        method.prepare(views, encoders)
        method.update(1.0)
        batches.append(encoders.key_of(views[1]))
    # The third batch ends with the last row; the fourth begins at row 0.
    torch.testing.assert_close(method.bank.bank, torch.cat([batches[3], batches[4], batches[2][:2]]))
    assert int(method.next_row) == 8


def test_preparation_loss_is_info_nce_against_key_and_bank() -> None:
    method, encoders = make(warm_start_temperature=0.3), ScriptedEncoders(C)
    method.bank.bank.mul_(3)
    q, other = unit().requires_grad_(), unit()
    output = method.prepare([q, other], encoders)
    (grad,) = torch.autograd.grad(output.loss, q)

    wide = q.detach().double().requires_grad_()
    key, u = encoders.key_of(other).double(), oracle.units(method.bank.bank.double())
    logits = torch.cat([(wide * key).sum(dim=1, keepdim=True), wide @ u.T], dim=1) / 0.3  # [B, 1 + K]
    wanted = torch.nn.functional.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(wanted, wide)[0], rtol=1e-4, atol=1e-6)
    probability = torch.softmax(logits, dim=1)[:, 0].mean()
    assert output.metrics["positive_probability"].item() == pytest.approx(probability.item(), rel=1e-5)


def test_training_after_preparation_steps_the_filled_bank() -> None:
    method, encoders = make(), ScriptedEncoders(C)
    for _ in range(3):
        method.prepare([unit(), unit()], encoders)
        method.update(1.0)
    filled = method.bank.bank.clone()
    method([unit(), unit()], encoders)
    method.update(1.0)
    torch.testing.assert_close(method.bank.bank, filled - 0.5 * method.bank.velocity)
    assert method.bank.velocity.abs().sum() > 0


def test_finish_preparation_copies_parameters_but_not_batch_norm_buffers() -> None:
    method, encoders = make(), small_pair(C)
    encoders.query(torch.randn(B, 3, 2, 2))
    with torch.no_grad():
        for p in encoders.query.parameters():
            p.add_(1.0)
    buffers = {name: b.clone() for name, b in encoders.key.named_buffers()}
    method.finish_preparation(encoders)
    for key, query in zip(encoders.key.parameters(), encoders.query.parameters()):
        assert torch.equal(key, query)
    for name, b in encoders.key.named_buffers():
        assert torch.equal(b, buffers[name]), name


def test_state_dict_goes_on_in_the_middle_of_preparation() -> None:
    encoders = ScriptedEncoders(C)
    straight, resumed = make(), make()
    batches = [[unit(), unit()] for _ in range(4)]

    def run(method: CaCo, steps: range) -> None:
        for step in steps:
            (method.prepare if step < 3 else method)(batches[step], encoders)
            method.update(1.0)

    run(straight, range(0, 2))
    resumed.load_state_dict(straight.state_dict())
    run(straight, range(2, 4))
    run(resumed, range(2, 4))
    assert torch.equal(straight.bank.bank, resumed.bank.bank)
    assert torch.equal(straight.bank.velocity, resumed.bank.velocity)


def test_state_dict_holds_the_bank_once() -> None:
    state = make().state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    assert sum(name.endswith("bank") for name in state) == 1


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"temperature": 0.0}, "caco.temperature: must be above 0, found 0.0"),
        ({"bank_temperature": -1.0}, "caco.bank_temperature: must be above 0, found -1.0"),
        ({"warm_start_temperature": float("inf")}, "caco.warm_start_temperature: must be above 0, found inf"),
        ({"bank_lr": -3.0}, "caco.bank_lr: must not be negative, found -3.0"),
        ({"backend": "gpu"}, "caco.backend: found 'gpu', want one of auto, reference, tiled, cuda"),
        ({"operands": "f64"}, "caco.operands: found 'f64', want one of f32, bf16, fp16"),
        ({"warm_start_steps": -1}, "caco.warm_start_steps: must not be negative, found -1"),
        ({"bank_size": 0}, "found size 0 and dim 6, expected at least 1 each"),
        ({"bank_momentum": 1.0}, "caco.bank_momentum: found 1.0, wanted a number in [0, 1)"),
        ({"norm": "unit"}, "caco.norm: found 'unit', want one of implicit, project"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        make(**settings)
    assert line in str(error.value)


def test_one_view_is_too_few() -> None:
    make().check_views([224, 160])
    make().check_views([224, 224, 96, 96])
    with pytest.raises(UserError, match="views: caco takes 2 large views and any number of small ones, found 1 in all"):
        make().check_views([224])


@pytest.mark.parametrize("sizes", [[96, 224, 224], [224, 96, 224], [96, 96, 224, 224]])
def test_the_large_views_come_first(sizes: list[int]) -> None:
    with pytest.raises(UserError, match="views: .* the first 2 for the large ones, found sizes .*largest first"):
        make().check_views(sizes)
