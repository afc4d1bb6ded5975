"""2, 3 and 4 gloo ranks with a share of the batch each do what one process does with the whole batch, however they
hold the bank.

Legend: B images of the global batch, K bank rows, C channels.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.bank import LearnableBank, ShardedBank
from caco_fast.distributed import all_reduce_sum, is_distributed, rank, world_size
from caco_fast.engine.state import Interval
from caco_fast.engine.step import Rates
from caco_fast.methods import AdCoConfig, CaCo, CaCoConfig, CaCoLoss, MoCoConfig, build_method, registered
from caco_fast.methods.ablation import AblationConfig
from caco_fast.methods.cacr import CACRConfig
from caco_fast.methods.clae import CLAEConfig
from caco_fast.methods.nnclr import NNCLRConfig
from caco_fast.methods.simclr import InfoNCEConfig, SimCLRConfig
from caco_fast.models import segment_batch_norm
from tests.methods.stand_ins import sgd_step, small_pair
from tests.ranks import run_ranks

RANKS = (2, 3, 4)
# No number of ranks but 1 divides K.
B, K, C, STEPS = 12, 41, 5, 20
BANKS = {"replicated": LearnableBank, "sharded": ShardedBank}


def own(rows: Tensor) -> Tensor:
    """The share of this rank in the global batch."""
    return rows.chunk(world_size())[rank()]


def mean_over_ranks(value: Tensor) -> Tensor:
    return all_reduce_sum(value.detach().clone()) / world_size()


def train_criterion(small: int, norm: str, parallel: str, operands: torch.dtype, batches: int) -> dict[str, Any]:
    """Steps of CaCoLoss on a linear encoder in f64, each of so many accumulated batches; the weight's gradients are
    averaged as DistributedDataParallel does it."""
    torch.manual_seed(0)
    bank = BANKS[parallel](K, C, norm=norm).double()
    criterion = CaCoLoss(bank, 0.1, 0.07, operands=operands)
    weight = torch.randn(C, C, dtype=torch.float64, requires_grad=True)
    losses, gradients, metrics = [], [], []
    for _ in range(STEPS):
        gradient = torch.zeros_like(weight)
        for _ in range(batches):
            images = [torch.randn(B, C, dtype=torch.float64) for _ in range(2 + small)]
            keys = [normalize(torch.randn(B, C, dtype=torch.float64), dim=1) for _ in range(2)]
            queries = [normalize(own(x) @ weight, dim=1) for x in images]
            loss = criterion(*queries[:2], *map(own, keys), queries[2:])
            gradient += torch.autograd.grad(loss / batches, weight)[0]
            losses.append(mean_over_ranks(loss))
            metrics.append(mean_over_ranks(criterion.positive_probability))
            metrics.append(criterion.positive_perplexity.double())
        gradients.append(mean_over_ranks(gradient))
        with torch.no_grad():
            weight -= 0.1 * gradients[-1]
        bank.step(0.3, scale=1 / batches)
    values = {"losses": losses, "gradients": gradients, "metrics": metrics}
    return {name: torch.stack(value) for name, value in values.items()} | dict(bank.state_dict())


def train_method(
    name: str, settings: Any, steps: int, crops: int = 0, sections: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """All phases of a method on real encoders, with BatchNorm and gradients over all ranks."""
    torch.manual_seed(0)
    sections = {name: settings, **sections}
    needs = registered(name).method.needs(settings, sections)
    encoders = small_pair(C, is_distributed(), *needs)
    method = segment_batch_norm(build_method(name, C, sections))
    step = sgd_step(method, encoders)
    losses = []
    for phase in method.phases(B):
        step.enter(phase)
        for _ in range(phase.steps or steps):
            step.interval.clear()
            step([own(torch.randn(B, 3, 2, 2)) for _ in range(2 + crops)], Rates(0.05, 0.99, 1.0))
            losses.append(mean_over_ranks(step.interval.sums["loss"]))
        phase.finish(encoders)
        step.interval = Interval()
    state = {f"encoders.{key}": value for key, value in encoders.state_dict().items()}
    return {"losses": torch.stack(losses), **state, **method.state_dict()}


CRITERIA = {
    f"{views}, {norm}, {parallel}{more}": (train_criterion, small, norm, parallel, *rest)
    for views, small, norm, more, *rest in (
        ("2 views", 0, "implicit", "", torch.float64, 1),
        ("2+2 views", 2, "project", "", torch.float64, 1),
        ("2 views", 0, "implicit", ", 3 batches a step", torch.float64, 3),
    )
    for parallel in BANKS
}
TRAINED = {
    f"caco, {2 + crops} views, {parallel}": (
        train_method,
        "caco",
        CaCoConfig(bank_size=K, bank_lr=0.1, bank_parallel=parallel),
        STEPS,
        crops,
    )
    for crops in (0, 2)
    for parallel in BANKS
}
TRAINED |= {
    "moco": (train_method, "moco", MoCoConfig(queue_size=K), 3),
    "moco symmetric": (train_method, "moco", MoCoConfig(queue_size=K, symmetric=True), 3),
}
# Candidates from the batch, and adversarial examples.
TRAINED |= {
    "simclr": (train_method, "simclr", SimCLRConfig(), 3),
    "infonce": (train_method, "infonce", InfoNCEConfig(), 3),
    "nnclr": (train_method, "nnclr", NNCLRConfig(queue_size=K, predictor_hidden=8), 3),
}
TRAINED |= {
    f"clae over {case}": (train_method, "clae", CLAEConfig(base=base), 3, 0, {base: section})
    for case, base, section in (
        ("simclr", "simclr", SimCLRConfig(temperature=0.5)),
        ("moco", "moco", MoCoConfig(queue_size=K)),
        ("caco, replicated", "caco", CaCoConfig(bank_size=K, bank_lr=0.1, bank_parallel="replicated")),
        ("caco, sharded", "caco", CaCoConfig(bank_size=K, bank_lr=0.1, bank_parallel="sharded")),
        ("adco, replicated", "adco", AdCoConfig(bank_size=K, bank_temperature=0.1, bank_parallel="replicated")),
        ("adco, sharded", "adco", AdCoConfig(bank_size=K, bank_temperature=0.1, bank_parallel="sharded")),
    )
}
TRAINED |= {
    "cacr": (train_method, "cacr", CACRConfig(), 3, 1),
    "cacr, queue": (train_method, "cacr", CACRConfig(form="queue", queue_size=K, negatives="all"), 3, 1),
    "cacr, global": (train_method, "cacr", CACRConfig(form="global", predictor_hidden=8), 3, 1),
}
TRAINED |= {
    f"adco{form}, {2 + crops} views, {parallel}": (
        train_method,
        "adco",
        # A bank temperature and a decay with which errors of rounding do not grow.
        AdCoConfig(bank_size=K, bank_lr=0.1, bank_temperature=0.1, bank_parallel=parallel, **settings),
        5,
        crops,
    )
    for form, crops, settings in (
        ("", 2, {"bank_weight_decay": 0.01}),
        (" symmetric", 0, {"symmetric": True}),
        (" without batch negatives", 0, {"batch_negatives": False}),
    )
    for parallel in BANKS
}
TRAINED |= {
    f"ablation, {positives} and {negatives}, {parallel}": (
        train_method,
        "ablation",
        AblationConfig(positives, negatives),
        5,
        0,
        {"caco": CaCoConfig(bank_size=K, bank_lr=0.1, bank_parallel=parallel)},
    )
    for positives, negatives, parallel in (
        ("key", "batch", "replicated"),
        ("queue", "batch", "replicated"),
        ("queue", "queue", "replicated"),
        ("key", "bank", "replicated"),
        ("key", "bank", "sharded"),
        ("queue", "bank", "sharded"),
        ("queue", "bank", "replicated"),
    )
}
CASES = {**CRITERIA, **TRAINED}


def run_cases(names: list[str]) -> dict[str, dict[str, Any]]:
    found = {name: function(*arguments) for name, (function, *arguments) in CASES.items() if name in names}
    return found | {"default bank": type(CaCo(CaCoConfig(bank_size=K), C).bank).__name__}


def cases_on(ranks: int) -> list[str]:
    """All on two and three ranks. On four, which take longest, one of each way to share a batch, a bank or a queue."""
    return [name for name in CASES if ranks < 4 or name in CRITERIA or name.startswith(("caco", "moco"))]


def on_ranks(cases: dict[str, Any]) -> pytest.MarkDecorator:
    pairs = [(ranks, case) for ranks in RANKS for case in cases_on(ranks) if case in cases]
    return pytest.mark.parametrize("ranks, case", pairs, ids=[f"{ranks} ranks-{case}" for ranks, case in pairs])


@functools.cache
def found_on(ranks: int) -> list[dict[str, dict[str, Any]]]:
    """What each rank found in all cases, computed once."""
    return run_ranks(run_cases, ranks, cases_on(ranks))


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    return {name: function(*arguments) for name, (function, *arguments) in CASES.items() if "sharded" not in name}


def compare(found: list[dict[str, Any]], wanted: dict[str, Any], shared: bool, tolerance: float) -> None:
    """Every value on every rank; a bank that is shared comes in one piece, on rank 0."""
    for number, values in enumerate(found):
        missing = {name for name in wanted if name.endswith(("bank", "velocity"))} if shared and number else set()
        assert values.keys() == wanted.keys() - missing
        for name, value in values.items():
            torch.testing.assert_close(
                value, wanted[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@on_ranks(CRITERIA)
def test_criterion(ranks: int, case: str, single: dict[str, Any]) -> None:
    wanted = single[case.replace("sharded", "replicated")]
    # Worst seen: 5e-15.
    compare([found[case] for found in found_on(ranks)], wanted, "sharded" in case, 1e-13)


@on_ranks(TRAINED)
def test_method(ranks: int, case: str, single: dict[str, Any]) -> None:
    wanted = single[case.replace("sharded", "replicated")]
    # In f32 the sums over the batch differ in their order. Worst seen: 1.1e-6 after 20 steps.
    first, *others = (found[case] for found in found_on(ranks))
    compare([first, *others], wanted, "sharded" in case, 1e-5)
    for other in others:
        for name, value in other.items():
            assert torch.equal(value, first[name]), f"the ranks differ in {name}"


@pytest.mark.parametrize("ranks", RANKS)
def test_several_ranks_share_the_bank_by_default(ranks: int) -> None:
    assert {found["default bank"] for found in found_on(ranks)} == {"ShardedBank"}
    assert type(CaCo(CaCoConfig(bank_size=K), C).bank) is LearnableBank
