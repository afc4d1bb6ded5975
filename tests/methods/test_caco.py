"""The CaCo method: what it asks of the encoders, how its bank is filled and stepped.

Legend: B images, K bank rows, C channels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.errors import UserError
from caco_fast.methods import CaCo, CaCoConfig, Phase
from tests import oracle
from tests.engine.replay import HostWait, NoHostWaits
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
    wanted = oracle.caco_loss([v.double() for v in views], keys, method.bank.bank.double(), 0.1)
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=0)
    assert set(output.metrics) == {"positive_probability", "positive_perplexity"}


def initialisation(method: CaCo) -> Phase:
    return method.phases(B)[0]


def fill(method: CaCo, views: list[Tensor], encoders: Any) -> None:
    """One step of the initialisation, without the encoder's part."""
    phase = initialisation(method)
    phase.update(phase.objective(views, encoders).rows, 0.3, None)


@pytest.mark.parametrize("warmup, follows, share", [(0.25, True, 0.25), (1.0, True, 1.0), (0.25, False, 1.0)])
def test_update_steps_the_bank_at_the_warmed_lr(warmup: float, follows: bool, share: float) -> None:
    method, encoders = make(bank_warmup=follows), ScriptedEncoders(C)
    views, before = [unit(), unit()], method.bank.bank.clone()
    method.update(method(views, encoders).rows, warmup)
    keys = [encoders.key_of(view).double() for view in views]
    gradient = oracle.caco_gradient([v.double() for v in views], keys, before.double(), 0.07)
    torch.testing.assert_close(method.bank.velocity.double(), gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.bank.bank, before - 0.5 * share * method.bank.velocity)


@pytest.mark.parametrize("size, batch, steps", [(10, 4, 3), (12, 4, 3), (3, 4, 1), (65536, 1024, 64)])
def test_initialisation_lasts_until_the_bank_is_full(size: int, batch: int, steps: int) -> None:
    assert make(bank_size=size).phases(batch)[0].steps == steps
    assert make(bank_size=size, warm_start_steps=7).phases(batch)[0].steps == 7


def test_initialisation_fills_successive_rows_with_successive_keys() -> None:
    method, encoders = make(), ScriptedEncoders(C)
    random, keys = method.bank.bank.clone(), []
    for step in range(initialisation(method).steps):
        views = [unit(), unit()]
        fill(method, views, encoders)
        assert encoders.calls[-2:] == ["queries of 1", "keys of 1"]
        keys.append(encoders.key_of(views[1]))
        full = min(K, B * (step + 1))
        torch.testing.assert_close(method.bank.bank[:full], torch.cat(keys)[:full])
        assert torch.equal(method.bank.bank[full:], random[full:])
    assert method.bank.velocity.abs().sum() == 0
    initialisation(method).finish(encoders)
    assert encoders.calls[-1] == "copy"


def test_a_longer_initialisation_goes_on_as_a_queue() -> None:
    method, encoders = make(warm_start_steps=5), ScriptedEncoders(C)
    batches = []
    for _ in range(5):
        views = [unit(), unit()]
        fill(method, views, encoders)
        batches.append(encoders.key_of(views[1]))
    # The third batch ends with the last row; the fourth begins at row 0.
    torch.testing.assert_close(method.bank.bank, torch.cat([batches[3], batches[4], batches[2][:2]]))
    assert int(method.next_row) == 8


def test_initialisation_loss_is_info_nce_against_key_and_bank() -> None:
    method, encoders = make(warm_start_temperature=0.3), ScriptedEncoders(C)
    method.bank.bank.mul_(3)
    q, other = unit().requires_grad_(), unit()
    output = initialisation(method).objective([q, other], encoders)
    (grad,) = torch.autograd.grad(output.loss, q)

    wide = q.detach().double().requires_grad_()
    key, u = encoders.key_of(other).double(), oracle.unit_rows(method.bank.bank.double())[0]
    logits = torch.cat([(wide * key).sum(dim=1, keepdim=True), wide @ u.T], dim=1) / 0.3  # [B, 1 + K]
    wanted = torch.nn.functional.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(wanted, wide)[0], rtol=1e-4, atol=1e-6)
    probability = torch.softmax(logits, dim=1)[:, 0].mean()
    assert output.metrics["positive_probability"].item() == pytest.approx(probability.item(), rel=1e-5)


def test_training_after_initialisation_steps_the_filled_bank() -> None:
    method, encoders = make(), ScriptedEncoders(C)
    for _ in range(3):
        fill(method, [unit(), unit()], encoders)
    filled = method.bank.bank.clone()
    method.update(method([unit(), unit()], encoders).rows, 1.0)
    torch.testing.assert_close(method.bank.bank, filled - 0.5 * method.bank.velocity)
    assert method.bank.velocity.abs().sum() > 0


def test_finish_initialisation_copies_parameters_but_not_batch_norm_buffers() -> None:
    method, encoders = make(), small_pair(C)
    encoders.query(torch.randn(B, 3, 2, 2))
    with torch.no_grad():
        for p in encoders.query.parameters():
            p.add_(1.0)
    buffers = {name: b.clone() for name, b in encoders.key.named_buffers()}
    initialisation(method).finish(encoders)
    for key, query in zip(encoders.key.parameters(), encoders.query.parameters()):
        assert torch.equal(key, query)
    for name, b in encoders.key.named_buffers():
        assert torch.equal(b, buffers[name]), name


def test_state_dict_goes_on_in_the_middle_of_initialisation() -> None:
    encoders = ScriptedEncoders(C)
    straight, resumed = make(), make()
    batches = [[unit(), unit()] for _ in range(4)]

    def run(method: CaCo, steps: range) -> None:
        for step in steps:
            phase = method.phases(B)[0 if step < 3 else 1]
            phase.update(phase.objective(batches[step], encoders).rows, 1.0, None)

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
        ({"temperature": 0.0}, "caco.temperature: found 0.0, expected a number above 0"),
        ({"bank_temperature": -1.0}, "caco.bank_temperature: found -1.0, expected a number above 0"),
        ({"warm_start_temperature": float("inf")}, "caco.warm_start_temperature: found inf, expected a number above 0"),
        ({"bank_lr": -3.0}, "caco.bank_lr: found -3.0, expected 0 or more"),
        ({"backend": "gpu"}, "caco.backend: found 'gpu', expected one of auto, reference, tiled, cuda"),
        ({"operands": "f64"}, "caco.operands: found 'f64', expected one of f32, bf16, fp16"),
        ({"warm_start_steps": -1}, "caco.warm_start_steps: found -1, expected 0 or more"),
        ({"bank_size": 0}, "found size 0 and dim 6, expected at least 1 each"),
        ({"bank_momentum": 1.0}, "caco.bank_momentum: found 1.0, expected a number in [0, 1)"),
        ({"norm": "unit"}, "caco.norm: found 'unit', expected one of implicit, project"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        make(**settings)
    assert line in str(error.value)


def test_one_view_is_too_few() -> None:
    make().check_views([224, 160])
    make().check_views([224, 224, 96, 96])
    with pytest.raises(UserError, match="views: found 1 in all, expected 2 large views"):
        make().check_views([224])


@pytest.mark.parametrize("sizes", [[96, 224, 224], [224, 96, 224], [96, 96, 224, 224]])
def test_the_large_views_come_first(sizes: list[int]) -> None:
    with pytest.raises(UserError, match="views: found sizes .*, expected the 2 large ones first"):
        make().check_views(sizes)


def test_filling_reads_the_next_row_from_the_device_only_where_the_host_can_not_know_it() -> None:
    method, keys, flag = make(), unit(), torch.tensor(0.0)
    with NoHostWaits():
        method.fill((keys,), 1.0)
        method.fill((keys,), 1.0)
    assert int(method.next_row) == 2 * B
    # Whether a step was skipped is known to the device alone.
    method.fill((keys,), 1.0, flag + 1)
    with pytest.raises(HostWait), NoHostWaits():
        method.fill((keys,), 1.0, flag)
    method.fill((keys,), 1.0, flag)
    assert int(method.next_row) == 0, "the batch that reached the last row ended there"
    again = make()
    again.fill((keys,), 1.0)
    again.load_state_dict(method.state_dict())
    again.fill((keys,), 1.0)
    assert int(again.next_row) == B
