"""AdCo against loops over its formula and autograd.

Legend: B images of the batch, K bank rows, C channels.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.bank import LearnableBank
from caco_fast.config import load_config
from caco_fast.errors import UserError
from caco_fast.methods import AdCo, AdCoConfig, Embeddings
from tests import oracle
from tests.methods.stand_ins import ScriptedEncoders

MOMENTUM, DECAY, LR = 0.9, 0.03, 0.4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
FORMS: dict[str, dict[str, Any]] = {
    "one-way": {},
    "one-way, no batch negatives": {"batch_negatives": False},
    "symmetric": {"symmetric": True},
    "symmetric, no batch negatives": {"symmetric": True, "batch_negatives": False},
    "project": {"norm": "project"},
}


def unit(rows: int, dim: int) -> Tensor:
    return normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1)


def make(size: int = 10, dim: int = 6, **settings: Any) -> AdCo:
    """In f64, with a bank of rows of any length."""
    given = {"bank_size": size, "bank_lr": LR, "bank_weight_decay": DECAY, **settings}
    method = AdCo(AdCoConfig(**given), dim).double()
    method.operands = torch.float64
    method.bank.bank.copy_(unit(size, dim) * (0.5 + 2 * torch.rand(size, 1)))
    return method


def directions(views: Sequence[Tensor], encoders: ScriptedEncoders, symmetric: bool) -> list[tuple[Tensor, Tensor]]:
    """The queries and keys whose losses are averaged (symmetric) or summed."""
    if symmetric:
        return [(views[0], encoders.key_of(views[1])), (views[1], encoders.key_of(views[0]))]
    return [(query, encoders.key_of(views[1])) for query in (views[0], *views[2:])]


def loss_by_hand(query: Tensor, key: Tensor, bank: Tensor, t: float, batch_negatives: bool) -> Tensor:
    """mean_i [ lse(all columns / t) - q_i . k_i / t ], in which each query has columns of its own."""
    units = bank / bank.norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(query)):
        keys = [query[i] @ key[n] for n in range(len(key)) if batch_negatives or n == i]
        columns = torch.stack(keys + [query[i] @ u for u in units]) / t
        terms.append(columns.exp().sum().log() - query[i] @ key[i] / t)
    return torch.stack(terms).mean()


def bank_gradient_by_hand(query: Tensor, key: Tensor, bank: Tensor, t: float, batch_negatives: bool) -> Tensor:
    """g of one direction, term by term: p_ij over keys and bank together."""
    total = [[0.0] * bank.shape[1] for _ in bank]
    units, keys = [oracle.unit(row) for row in bank.tolist()], key.tolist()
    for i, q in enumerate(query.tolist()):
        among = keys if batch_negatives else keys[i : i + 1]
        norm = math.fsum(math.exp(oracle.dot(q, row) / t) for row in among + units)
        for j, u in enumerate(units):
            s, length = oracle.dot(q, u), math.sqrt(oracle.dot(bank[j].tolist(), bank[j].tolist()))
            p = math.exp(s / t) / norm
            for c in range(len(u)):
                total[j][c] -= p * (q[c] - s * u[c]) / (t * length * len(query))
    return torch.tensor(total, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperatures", [(0.12, 0.02), (0.14, 0.03)], ids=str)
@pytest.mark.parametrize("batch, size, dim", [(5, 13, 6), (1, 7, 3), (9, 4, 5)], ids=["", "B1", "K below B"])
def test_three_steps_follow_the_formula(form: str, temperatures: tuple[float, float], batch: int, size: int, dim: int):
    check(FORMS[form], 2, temperatures, batch, size, dim)


@pytest.mark.parametrize("batch_negatives", [True, False])
def test_three_steps_of_multi_crop_sum_over_its_queries(batch_negatives: bool) -> None:
    check({"batch_negatives": batch_negatives}, 6, (0.12, 0.02), 4, 11, 5)


def check(
    settings: dict[str, Any], views: int, temperatures: tuple[float, float], batch: int, size: int, dim: int
) -> None:
    torch.manual_seed(0)
    t, t_m = temperatures
    method = make(size, dim, temperature=t, bank_temperature=t_m, **settings)
    encoders = ScriptedEncoders(dim)
    symmetric, negatives = bool(settings.get("symmetric")), bool(settings.get("batch_negatives", True))
    bank, velocity = method.bank.bank.clone(), torch.zeros(size, dim, dtype=torch.float64)
    for _ in range(3):
        images = [unit(batch, dim).requires_grad_() for _ in range(views)]
        output = method(images, encoders)
        found = torch.autograd.grad(output.loss, images, allow_unused=True)

        pairs = directions(images, encoders, symmetric)
        share = 1 / len(pairs) if symmetric else 1.0
        losses = [loss_by_hand(*pair, bank, t, negatives) for pair in pairs]
        wanted = share * torch.stack(losses).sum()
        torch.testing.assert_close(output.loss, wanted, **CLOSE)
        for left, right in zip(found, torch.autograd.grad(wanted, images, allow_unused=True), strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                torch.testing.assert_close(left, right, **CLOSE)

        method.update(output.rows, 0.25)
        gradient = torch.stack([share * bank_gradient_by_hand(*pair, bank, t_m, negatives) for pair in pairs]).sum(0)
        ascent = bank.clone().requires_grad_()
        total = share * sum(loss_by_hand(q.detach(), k, ascent, t_m, negatives) for q, k in pairs)
        torch.testing.assert_close(gradient, -torch.autograd.grad(total, ascent)[0], **CLOSE)
        velocity = MOMENTUM * velocity + gradient + DECAY * bank
        bank = bank - LR * velocity
        if settings.get("norm") == "project":
            bank = bank / bank.norm(dim=1, keepdim=True)
        torch.testing.assert_close(method.bank.velocity, velocity, **CLOSE)
        torch.testing.assert_close(method.bank.bank, bank, **CLOSE)


def test_the_metric_is_the_mean_probability_of_the_key() -> None:
    method, encoders = make(temperature=0.2), ScriptedEncoders(6)
    views = [unit(4, 6), unit(4, 6)]
    keys, u = encoders.key_of(views[1]), oracle.unit_rows(method.bank.bank)[0]
    p = torch.softmax(views[0] @ torch.cat([keys, u]).T / 0.2, dim=1)
    found = method(views, encoders).metrics["positive_probability"]
    torch.testing.assert_close(found, p[:, :4].diagonal().mean(), **CLOSE)


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_adversarial_image_is_a_query_with_key_k_b(symmetric: bool) -> None:
    method, encoders = make(symmetric=symmetric, temperature=0.3), ScriptedEncoders(6)
    views, other = [unit(4, 6), unit(4, 6)], unit(4, 6).requires_grad_()
    embeddings = method.embed(views, encoders)
    loss = method.adversarial_loss(embeddings, views[0], other)
    wanted = loss_by_hand(other, encoders.key_of(views[1]), method.bank.bank, 0.3, True)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(loss, other), torch.autograd.grad(wanted, other), **CLOSE)
    assert method.bank.discard() == 0


@pytest.mark.parametrize("record, mode, records", [(True, True, 1), (False, True, 0), (True, False, 0)])
def test_only_training_records_rows(record: bool, mode: bool, records: int) -> None:
    method = make().train(mode)
    method.loss(Embeddings([unit(3, 6)], [unit(3, 6)]), record)
    assert method.bank.discard() == records


@pytest.mark.parametrize("warms", [False, True])
def test_the_bank_warms_up_only_if_it_is_told_to(warms: bool) -> None:
    method, encoders = make(bank_warmup=warms), ScriptedEncoders(6)
    before = method.bank.bank.clone()
    method.update(method([unit(4, 6), unit(4, 6)], encoders).rows, 0.25)
    eta = LR * (0.25 if warms else 1.0)
    torch.testing.assert_close(method.bank.bank, before - eta * method.bank.velocity)
    assert method.rates(0.25)["bank_lr"] == pytest.approx(eta)


@pytest.mark.parametrize("given, used", [(None, 0.15), (0.3, 0.3)])
def test_initialisation_has_the_temperature_of_the_loss_and_no_batch_negatives(
    given: float | None, used: float
) -> None:
    method, encoders = make(temperature=0.15, warm_start_temperature=given), ScriptedEncoders(6)
    views, bank = [unit(4, 6), unit(4, 6), unit(4, 6)], method.bank.bank.clone()
    phase = method.phases(4)[0]
    output = phase.objective(views, encoders)
    keys = encoders.key_of(views[1])
    torch.testing.assert_close(output.loss, loss_by_hand(views[0], keys, bank, used, False), **CLOSE)
    phase.update(output.rows, 0.5, None)
    torch.testing.assert_close(method.bank.bank, torch.cat([keys, bank[4:]]))
    assert (phase.steps, method.next_row) == (3, 4)
    assert method.bank_uses(4, 2)[0].temperatures == ((0.15, 0.02), (used,))


def test_a_part_of_a_batch_has_the_loss_of_the_batch_only_without_batch_negatives() -> None:
    assert not make().accumulates
    assert make(batch_negatives=False).accumulates


def test_the_published_settings_are_the_defaults() -> None:
    config = AdCoConfig()
    assert (config.temperature, config.bank_temperature, config.initial_temperature) == (0.12, 0.02, 0.12)
    assert (config.bank_lr, config.bank_momentum, config.bank_weight_decay) == (3.0, 0.9, 1e-4)
    assert config.batch_negatives and not config.symmetric and not config.bank_warmup
    assert type(AdCo(AdCoConfig(bank_size=5), 3).bank) is LearnableBank


@pytest.mark.parametrize(
    "name, lr, bank, temperatures, symmetric, crops",
    [
        ("200ep", 0.03, 65536, (0.12, 0.02), False, []),
        ("800ep", 0.03, 65536, (0.12, 0.02), False, []),
        ("200ep_symmetric", 0.03, 65536, (0.12, 0.02), True, []),
        ("200ep_k8192_symmetric", 0.04, 8192, (0.14, 0.03), True, []),
        ("multicrop_200ep", 0.03, 65536, (0.12, 0.02), False, [192, 160, 128, 96]),
        ("multicrop_800ep", 0.03, 65536, (0.12, 0.02), False, [192, 160, 128, 96]),
    ],
)
def test_published_recipes(
    name: str, lr: float, bank: int, temperatures: tuple[float, float], symmetric: bool, crops: list[int]
) -> None:
    config = load_config(f"imagenet_resnet50_adco_{name}")
    adco, optimizer, schedule = config.adco, config.optimizer, config.schedule  # type: ignore[attr-defined]
    assert (adco.bank_size, adco.bank_lr, adco.bank_weight_decay, adco.symmetric) == (bank, 3.0, 1e-4, symmetric)
    assert (adco.temperature, adco.bank_temperature) == temperatures
    assert adco.initial_temperature == adco.temperature and adco.batch_negatives
    assert (optimizer.name, optimizer.lr, optimizer.scale_lr, optimizer.weight_decay) == ("sgd", lr, False, 1e-4)
    ending = schedule.per, schedule.final_ratio, schedule.warmup_epochs
    assert ending == ("epoch", 0.02, 0) and (schedule.key_momentum, schedule.key_momentum_rises) == (0.999, False)
    assert config.trainer.batch_size == 256 and f"{config.trainer.epochs}ep" in name
    views = [view for view in config.views for _ in range(view.count)]
    assert [view.size for view in views] == [224, 224, *crops]
    shares = [(0.2, 1.0), (0.2, 1.0), (0.172, 0.86), (0.143, 0.715), (0.114, 0.571), (0.086, 0.429)]
    assert [tuple(view.scale) for view in views] == shares[: len(views)]
    colours = {(v.jitter_p, v.brightness, v.contrast, v.saturation, v.hue, v.grey_p, v.blur_p) for v in views}
    assert colours == {(0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5)}


@pytest.mark.parametrize("symmetric, views, rows", [(False, 2, 8), (False, 6, 40), (True, 2, 16)])
def test_the_check_of_the_kernels_knows_its_rows(symmetric: bool, views: int, rows: int) -> None:
    (use,) = make(symmetric=symmetric).bank_uses(8, views)
    assert (use.rows, use.positives, use.weight_decay, use.step_temperature) == (rows, 0, DECAY, 0.02)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"temperature": 0.0}, "adco.temperature: found 0.0, expected a number above 0"),
        ({"warm_start_temperature": 0.0}, "adco.warm_start_temperature: found 0.0, expected a number above 0"),
        ({"bank_weight_decay": -1e-4}, "adco.bank_weight_decay: found -0.0001, expected 0 or more"),
        ({"backend": "gpu"}, "adco.backend: found 'gpu', expected one of auto"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        make(**settings)
    assert line in str(error.value)


@pytest.mark.parametrize(
    "symmetric, sizes, line",
    [
        (False, [224], "views: found 1 views of an image, expected a query, its key, and"),
        (True, [224], "views: found 1 views of an image, expected 2 for adco.symmetric=true"),
        (True, [224, 224, 96], "views: found 3 views of an image, expected 2 for adco.symmetric=true"),
        (False, [224, 96], "views: found sizes 224, 96, expected none above the second"),
        (False, [224, 192, 224], "views: found sizes 224, 192, 224, expected none above the second"),
    ],
)
def test_views_that_it_can_not_use(symmetric: bool, sizes: list[int], line: str) -> None:
    method = make(symmetric=symmetric)
    method.check_views([224, 224])
    with pytest.raises(UserError, match=line):
        method.check_views(sizes)


def test_multi_crop_takes_one_key_and_five_queries() -> None:
    method, encoders = make(), ScriptedEncoders(6)
    method.check_views([224, 224, 192, 160, 128, 96])
    method([unit(4, 6) for _ in range(6)], encoders)
    assert encoders.calls == ["queries of 5", "keys of 1"]
