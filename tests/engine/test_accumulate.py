"""A batch in parts: the same training as with the whole batch, on 1 and 2 ranks, where no BatchNorm sees the parts.

Legend: B images of the global batch, K bank rows, C channels.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caco_fast import training
from caco_fast.distributed import all_reduce_sum, rank, world_size
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.settings import TrainerConfig
from caco_fast.engine.step import Rates, TrainStep
from caco_fast.errors import UserError
from caco_fast.methods import AdCoConfig, CaCoConfig, Method, MoCoConfig, build_method
from caco_fast.models import Encoder, EncoderPair
from tests.engine.tiny_run import config
from tests.methods.small_methods import Keyless, Temperature
from tests.methods.stand_ins import sgd_step, small_pair
from tests.ranks import run_ranks

B, K, C, STEPS = 12, 41, 5, 6
# Whatever the gradients are, some are above it and some below.
CLIP = 8.0


class WideEncoder(Encoder):
    """In f64, and with GroupNorm in place of BatchNorm."""

    def __init__(self) -> None:
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GroupNorm(4, 16), nn.ReLU())
        super().__init__(backbone, nn.Linear(16, C))
        self.double()

    def _embed(self, view: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(view)), dim=1)


def train(name: str, settings: Any, crops: int, accumulate: int, scaled: bool = False) -> dict[str, Tensor]:
    """All phases of a method; the images of a step are those of the whole batch, of which a rank takes its share."""
    torch.manual_seed(0)
    encoders = EncoderPair(WideEncoder())
    method = build_method(name, C, {name: settings}).double()
    if name == "caco":
        method.criterion.operands = torch.float64
    if name == "adco":
        method.operands = torch.float64
    optimizer = torch.optim.SGD(encoders.query.parameters(), lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    device = torch.device("cpu")
    step = TrainStep(method, encoders, optimizer, scaler, device, accumulate=accumulate, clip_gradient=CLIP)
    losses, norms = [], []
    for phase in method.phases(B):
        step.enter(phase)
        for _ in range(phase.steps or STEPS):
            step.interval.clear()
            images = [torch.randn(B, 3, 2, 2, dtype=torch.float64) for _ in range(2 + crops)]
            step([view.chunk(world_size())[rank()] for view in images], Rates(0.05, 0.99, 1.0))
            losses.append(all_reduce_sum(step.interval.sums["loss"].clone()) / world_size())
            norms.append(step.interval.sums["gradient_norm"].clone())
        phase.finish(encoders)
    state = {f"encoders.{key}": value for key, value in encoders.state_dict().items()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), **state, **method.state_dict()}


CASES = {
    "caco": ("caco", CaCoConfig(bank_size=K, bank_lr=0.1), 0),
    "caco, 2+2 views": ("caco", CaCoConfig(bank_size=K, bank_lr=0.1, bank_parallel="replicated"), 2),
    "adco": ("adco", AdCoConfig(bank_size=K, bank_lr=0.1, bank_temperature=0.1, batch_negatives=False), 0),
    "moco": ("moco", MoCoConfig(queue_size=K), 0),
    "moco, symmetric": ("moco", MoCoConfig(queue_size=K, symmetric=True), 0),
}


def in_parts(accumulate: int) -> dict[str, dict[str, Tensor]]:
    return {name: train(*case, accumulate) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Tensor]]:
    return in_parts(1)


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in wanted:
        if name in found:
            # Only the order of sums differs. Worst seen: 7e-15.
            torch.testing.assert_close(
                found[name], wanted[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n} {m}"
            )


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_parts_train_as_the_whole_batch(accumulate: int, whole: dict[str, dict[str, Tensor]]) -> None:
    for name, found in in_parts(accumulate).items():
        assert found.keys() == whole[name].keys()
        compare(found, whole[name])


def test_parts_under_a_scaler_train_as_the_whole_batch() -> None:
    compare(*(train(*CASES["caco"], parts, scaled=True) for parts in (3, 1)))


def test_parts_on_two_ranks_train_as_the_whole_batch(whole: dict[str, dict[str, Tensor]]) -> None:
    first, second = run_ranks(in_parts, 2, 3)
    for name, wanted in whole.items():
        # The whole of a bank in shards is on rank 0.
        assert first[name].keys() == wanted.keys()
        compare(first[name], wanted)
        compare(second[name], wanted)


def test_clipping_scales_to_the_largest_norm(whole: dict[str, dict[str, Tensor]]) -> None:
    """The norm in the metrics is that before clipping."""
    norms = torch.cat([values["norms"] for values in whole.values()])
    assert norms.min() < CLIP < norms.max()


def test_the_step_follows_the_clipped_gradient() -> None:
    method = build_method("moco", C, {"moco": MoCoConfig(queue_size=K)})
    for clip in (0.0, 1e-3):
        torch.manual_seed(1)
        pair = small_pair(C)
        step = sgd_step(method, pair)
        step.clip_gradient = clip
        step.enter(method.phases(B)[-1])
        before = [value.detach().clone() for value in pair.query.parameters()]
        step([torch.randn(B, 3, 2, 2) for _ in range(2)], Rates(1.0, 0.99, 1.0))
        moved = torch.cat([(new.detach() - old).flatten() for new, old in zip(pair.query.parameters(), before)]).norm()
        wanted = clip or step.interval.sums["gradient_norm"]
        assert float(moved) == pytest.approx(float(wanted), rel=1e-4)


def test_a_loss_with_negatives_from_the_batch_refuses_parts() -> None:
    method = Keyless(Temperature(), C)
    pair = small_pair(C, key_encoder=False)
    make = partial(TrainStep, method, pair, torch.optim.SGD(pair.query.parameters()), torch.amp.GradScaler("cpu"))
    make(torch.device("cpu"))
    line = "trainer.accumulate: found 2, but the loss of Keyless needs its whole batch at once; set it to 1"
    with pytest.raises(UserError, match=line):
        make(torch.device("cpu"), accumulate=2)
    assert not Method.accumulates


@pytest.mark.parametrize("setting, line", [("accumulate", "found 0, expected a number from 1 to 256")])
def test_bounds(setting: str, line: str) -> None:
    with pytest.raises(UserError, match=f"trainer.{setting}: {line}"):
        TrainerConfig(**{setting: 0})


def test_a_batch_that_does_not_divide_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer.accumulate: found 3, .* \(8 images over 1 ranks\)"):
        training.train(config(images, "trainer.accumulate=3"), tmp_path)


def test_a_run_in_parts_goes_on_where_it_was_stopped(images: Path, tmp_path: Path) -> None:
    """Bit for bit, from the middle of an epoch."""
    settings = ("trainer.accumulate=2", "trainer.clip_gradient=0.1", "evaluation.every_epochs=0", "trainer.epochs=1")
    training.train(config(images, *settings), tmp_path / "whole")
    training.train(config(images, *settings, "trainer.max_steps=8"), tmp_path / "parts")
    training.train(config(images, *settings), tmp_path / "parts", resume="auto")
    whole, parts = (
        [(line["loss"], line["gradient_norm"]) for line in read_metrics(tmp_path / name)] for name in ("whole", "parts")
    )
    assert len(whole) == 10 and whole == parts
