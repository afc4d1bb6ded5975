"""The rows of the ablation against loops over queries and their candidates, and Positive+Negative against CaCo itself.

Legend: B images, K rows of bank or queue, C channels.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.build import method_sections
from caco_fast.config import load_config, settings_of
from caco_fast.configs import find_config
from caco_fast.engine.step import Rates
from caco_fast.errors import UserError
from caco_fast.methods import CaCo, CaCoConfig, Method, build_method
from caco_fast.methods.ablation import NEGATIVES, POSITIVES, AblationConfig
from tests.methods.stand_ins import ScriptedEncoders, sgd_step, small_pair

C, STEPS, LR, MOMENTUM, WARMUP = 5, 3, 0.05, 0.9, 0.5
EXIST = [pair for pair in itertools.product(POSITIVES, NEGATIVES) if pair[0] != "bank"]
CASES = [(*pair, "key") for pair in EXIST] + [("queue", negatives, "query") for negatives in NEGATIVES]


def make(positives: str, negatives: str, select_by: str = "key", **caco: Any) -> Method:
    settings = {"bank_size": 7, "bank_lr": LR, "bank_momentum": MOMENTUM, **caco}
    sections = {"ablation": AblationConfig(positives, negatives, select_by), "caco": CaCoConfig(**settings)}
    method = build_method("ablation", C, sections)
    method.operands = torch.float64
    return method


def state_of(method: Method) -> dict[str, Tensor]:
    """Copies of bank, velocity, queue and pointer, by these names."""
    return {name.rpartition(".")[2]: value.clone() for name, value in method.state_dict().items()}


def nearest(row: Tensor, rows: Tensor) -> int:
    similarities = [float(row @ other) for other in rows]
    return similarities.index(max(similarities))


def by_hand(
    case: tuple[str, str, str], state: dict[str, Tensor], views: list[Tensor], keys: list[Tensor], t: float, t_m: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, mean probability of the positive, and the bank's gradient [K, C]: query by query, from its candidates."""
    positives, negatives, select_by = case
    batch = len(keys[0])
    queue = normalize(state["queue"], dim=1) if "queue" in state else torch.empty(0, C)
    bank = state.get("bank", torch.empty(0, C, dtype=torch.float64))
    loss, probabilities, gradient = torch.zeros((), dtype=torch.float64), [], torch.zeros_like(bank)
    for queries, others in ((views[0], keys[1]), (views[1], keys[0])):
        for i, (q, own) in enumerate(zip(queries, others)):
            chosen = nearest(own if select_by == "key" else q.detach(), queue) if positives == "queue" else None
            positive = own if chosen is None else queue[chosen]
            candidates = [positive]
            if negatives == "batch":
                candidates += [key for at, key in enumerate(others) if at != i]
            elif negatives == "queue":
                candidates += [row for at, row in enumerate(queue) if at != chosen]
            else:
                candidates += [row / row.norm() for row in bank]
            scores = torch.stack([q @ row for row in candidates])
            loss = loss - torch.log_softmax(scores / t, dim=0)[0] / batch
            probabilities.append(torch.softmax(scores / t, dim=0)[0])
            if negatives == "bank":
                p = torch.softmax(scores / t_m, dim=0)[1:]
                for j, (row, u) in enumerate(zip(bank, candidates[1:])):
                    gradient[j] -= (p[j] * (q - (q @ u) * u) / (t_m * row.norm() * batch)).detach()
    return loss, torch.stack(probabilities).mean(), gradient


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch, rows, t, t_m", [(3, 7, 0.1, 0.1), (4, 3, 0.12, 0.02), (1, 5, 0.14, 0.03)])
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_three_steps(case: tuple[str, str, str], batch: int, rows: int, t: float, t_m: float) -> None:
    method = make(*case, bank_size=rows, temperature=t, bank_temperature=t_m).double()
    encoders = ScriptedEncoders(C)
    for _ in range(STEPS):
        before = state_of(method)
        views = [normalize(torch.randn(batch, C, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2)]
        keys = [encoders.key_of(view) for view in views]
        loss, probability, gradient = by_hand(case, before, views, keys, t, t_m)
        wanted = torch.autograd.grad(loss, views, allow_unused=True)
        output = method(views, encoders)
        found = torch.autograd.grad(output.loss, views)
        assert encoders.calls[-2:] == ["queries of 2", "keys of 2"]
        close(output.loss, loss.detach())
        close(output.metrics["positive_probability"], probability.detach())
        for mine, theirs in zip(found, wanted):
            close(mine, theirs)
        method.update(output.rows, WARMUP)
        after = state_of(method)
        assert ("bank" in after) == (case[1] == "bank") and ("queue" in after) == ("queue" in case)
        if "bank" in after:
            close(after["velocity"], MOMENTUM * before["velocity"] + gradient)
            close(after["bank"], before["bank"] - WARMUP * LR * after["velocity"])
        if "queue" in after:
            queue = before["queue"].clone()
            for at, key in enumerate(torch.cat(keys)):
                queue[(int(before["pointer"]) + at) % rows] = key
            close(after["queue"], queue)
            assert int(after["pointer"]) == (int(before["pointer"]) + 2 * batch) % rows


def test_the_bank_of_negatives_raises_the_loss_of_the_encoder() -> None:
    """With t = t_m the gradient of the bank is that of - L."""
    method = make("key", "bank").double()
    encoders, views = ScriptedEncoders(C), [normalize(torch.randn(3, C, dtype=torch.float64), dim=1) for _ in range(2)]
    keys = [encoders.key_of(view) for view in views]
    state = state_of(method)
    bank = state["bank"].clone().requires_grad_()
    loss, _, _ = by_hand(("key", "bank", "key"), state | {"bank": bank}, views, keys, 0.08, 0.08)
    views[0].requires_grad_()
    method.update(method(views, encoders).rows, WARMUP)
    close(state_of(method)["velocity"], -torch.autograd.grad(loss, bank)[0])


@pytest.mark.parametrize("positives, negatives", [*EXIST, ("bank", "bank")])
def test_a_bank_and_its_initialisation_only_where_it_is_used(positives: str, negatives: str) -> None:
    phases = make(positives, negatives).phases(4)
    assert [phase.name for phase in phases] == ["initialisation"] * (negatives == "bank") + ["training"]


def train(name: str, sections: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    encoders = small_pair(C)
    method = build_method(name, C, sections)
    step, losses = sgd_step(method, encoders), []
    for phase in method.phases(4):
        step.enter(phase)
        for _ in range(phase.steps or 5):
            step.interval.clear()
            step([torch.randn(4, 3, 2, 2) for _ in range(2)], Rates(0.05, 0.99, 1.0))
            losses.append(float(step.interval.sums["loss"]))
        phase.finish(encoders)
    return losses, {**encoders.state_dict(), **method.state_dict()}


def test_positive_and_negative_from_the_bank_is_caco_to_the_bit() -> None:
    sections = {"ablation": AblationConfig("bank", "bank"), "caco": CaCoConfig(bank_size=11, bank_lr=0.1)}
    (losses, state), (wanted, of_caco) = train("ablation", sections), train("caco", sections)
    assert losses == wanted and len(losses) == 3 + 5
    assert state.keys() == of_caco.keys()
    for name, value in state.items():
        assert torch.equal(value, of_caco[name]), name
    assert type(build_method("ablation", C, sections)) is CaCo


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"positives": "batch"}, "ablation.positives: found 'batch', expected one of key, queue, bank"),
        ({"negatives": "key"}, "ablation.negatives: found 'key', expected one of batch, queue, bank"),
        ({"select_by": "bank"}, "ablation.select_by: found 'bank', expected one of key, query"),
        ({"negatives": "batch"}, "ablation.negatives: found 'batch' with ablation.positives=bank, expected bank, for"),
        ({"negatives": "queue"}, "ablation.negatives: found 'queue' with ablation.positives=bank, expected bank, for"),
        ({"select_by": "query"}, "ablation.select_by: found 'query' with ablation.positives=bank, expected key, for"),
        ({"positives": "key", "select_by": "query"}, "ablation.select_by: found 'query' with ablation.positives=key,"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as error:
        AblationConfig(**settings)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("positives, negatives", EXIST)
def test_it_takes_two_views(positives: str, negatives: str) -> None:
    method = make(positives, negatives)
    method.check_views([32, 32])
    line = f"views: found 3 views of an image, expected 2 for ablation.positives={positives} with negatives={negatives}"
    with pytest.raises(UserError, match=line):
        method.check_views([32, 32, 16])


def test_negatives_of_the_batch_need_the_whole_batch() -> None:
    assert {pair for pair in EXIST if not make(*pair).accumulates} == {("key", "batch"), ("queue", "batch")}


ROWS = {
    "none": ("key", "batch"),
    "positive": ("queue", "batch"),
    "negative": ("key", "bank"),
    "positive_negative": ("bank", "bank"),
}
BASES = {
    "imagenet_resnet50_200ep_batch1024": "imagenet_resnet50_200ep_batch1024",
    "cifar10_resnet18": "cifar10_resnet18",
    "small": "quickstart",
}


@pytest.mark.parametrize(
    "base, row",
    [
        (base, row)
        for base in BASES
        for row in ROWS
        if (base, row) != ("imagenet_resnet50_200ep_batch1024", "positive_negative")
    ],
)
def test_a_row_differs_from_its_base_in_the_method_alone(base: str, row: str) -> None:
    config = load_config(find_config(f"{base}_{row}"))
    found, of_base = settings_of(config), settings_of(load_config(find_config(BASES[base])))
    positives, negatives = ROWS[row]
    wanted = {"method": "ablation", "ablation.positives": positives, "ablation.negatives": negatives}
    assert found == of_base | wanted
    method = build_method(config.method, C, method_sections(config))
    method.check_views([view.size for view in config.views for _ in range(view.count)])


@pytest.mark.parametrize(
    "positives, negatives, uses",
    [
        ("key", "batch", []),
        ("queue", "batch", [((), True)]),
        ("key", "queue", [(((0.08,),), False)]),
        ("queue", "queue", [(((0.08,),), True)]),
    ],
)
def test_the_queue_says_which_operations_it_calls(positives: str, negatives: str, uses: list[Any]) -> None:
    config = AblationConfig(positives, negatives)
    method = build_method("ablation", 4, {"ablation": config, "caco": CaCoConfig(bank_size=9)})
    assert [(use.temperatures, use.selects) for use in method.bank_uses(3, 2)] == uses
