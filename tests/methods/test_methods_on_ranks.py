"""Two gloo ranks with half a batch each do what one process does with the whole batch.

Legend: B images of the global batch, K bank rows, C channels.
"""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from stand_ins import small_pair
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.bank import LearnableBank
from caco_fast.distributed import all_reduce_sum, is_distributed, rank, world_size
from caco_fast.methods import METHODS, CaCoConfig, CaCoLoss, MoCoConfig

B, K, C, STEPS = 6, 11, 5, 3


def own(rows: Tensor) -> Tensor:
    """This rank's share of the global batch."""
    return rows.chunk(world_size())[rank()]


def train_criterion(small: int, norm: str) -> dict[str, Tensor]:
    """Steps of CaCoLoss on a linear encoder in f64; weight gradients as DistributedDataParallel averages them."""
    torch.manual_seed(0)
    bank = LearnableBank(K, C, norm=norm).double()
    criterion = CaCoLoss(bank, 0.1, 0.07, operands=torch.float64)
    weight = torch.randn(C, C, dtype=torch.float64, requires_grad=True)
    gradients = []
    for _ in range(STEPS):
        images = [torch.randn(B, C, dtype=torch.float64) for _ in range(2 + small)]
        keys = [normalize(torch.randn(B, C, dtype=torch.float64), dim=1) for _ in range(2)]
        queries = [normalize(own(x) @ weight, dim=1) for x in images]
        loss = criterion(*queries[:2], *map(own, keys), queries[2:])
        (gradient,) = torch.autograd.grad(loss, weight)
        gradients.append(all_reduce_sum(gradient) / world_size())
        with torch.no_grad():
            weight -= 0.1 * gradients[-1]
        bank.step(0.3)
    return {"bank": bank.bank, "velocity": bank.velocity, "gradients": torch.stack(gradients)}


def train_method(name: str, settings: Any) -> dict[str, Tensor]:
    """Preparation and steps of a method on real encoders, with BatchNorm and gradients over all ranks."""
    torch.manual_seed(0)
    encoders = small_pair(C, joint_views=is_distributed())
    method = METHODS[name](settings, C)
    if is_distributed():
        encoders.distribute(torch.device("cpu"))
    optimizer = torch.optim.SGD(encoders.query.parameters(), lr=0.05)
    losses = []
    preparation = method.preparation_steps(B)
    for step in range(preparation + STEPS):
        views = [own(torch.randn(B, 3, 2, 2)) for _ in range(2)]
        output = (method.prepare if step < preparation else method)(views, encoders)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.update(1.0)
        if step == preparation - 1:
            method.finish_preparation(encoders)
        losses.append(all_reduce_sum(output.loss.detach().clone()) / world_size())
    state = {f"encoders.{key}": value for key, value in encoders.state_dict().items()}
    return {"losses": torch.stack(losses), **state, **method.state_dict()}


def on_ranks() -> dict[str, dict[str, Tensor]]:
    return {name: function(*arguments) for name, (function, *arguments) in CASES.items()}


CASES = {
    "criterion of 2 views, implicit": (train_criterion, 0, "implicit"),
    "criterion of 2+2 views, project": (train_criterion, 2, "project"),
    "caco": (train_method, "caco", CaCoConfig(bank_size=K, bank_lr=0.1)),
    "moco": (train_method, "moco", MoCoConfig(queue_size=K)),
    "moco symmetric": (train_method, "moco", MoCoConfig(queue_size=K, symmetric=True)),
}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(on_ranks, 2)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("criterion")])
def test_criterion_on_two_ranks(case: str, two_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    function, *arguments = CASES[case]
    wanted = function(*arguments)
    for found in two_ranks:
        for name, value in wanted.items():
            torch.testing.assert_close(found[case][name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("criterion")])
def test_method_on_two_ranks(case: str, two_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    function, *arguments = CASES[case]
    wanted = function(*arguments)
    for found in two_ranks:
        assert found[case].keys() == wanted.keys()
        for name, value in wanted.items():
            # In f32 the sums over the batch differ in their order.
            torch.testing.assert_close(
                found[case][name], value, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    for name, value in two_ranks[0][case].items():
        assert torch.equal(value, two_ranks[1][case][name]), f"the ranks differ in {name}"
