"""A captured step: replays give what steps launched one by one give, bit for bit, with other views and rates each time.

On the CPU by tests/engine/replay.py in place of CUDA graphs; on a GPU by themselves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from replay import HostWait, NoHostWaits, Recorder
from tiny_run import config, write_images
from torch import Tensor

from caco_fast import training
from caco_fast.data import Batch
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.settings import TrainerConfig
from caco_fast.engine.state import Rates
from caco_fast.engine.step_graph import WARMUP_STEPS, StepGraph
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError
from caco_fast.ops import bank_step
from caco_fast.optim import OptimizerConfig, build_optimizer

CPU = torch.device("cpu")
NEVER = 10**9
STEPS = 20
LARS = "optimizer={name: lars, lr: 0.3, scale_lr: false}"
SGD = "optimizer={name: sgd, lr: 0.03}"
ADAMW = "optimizer={name: adamw, lr: 0.003}"
SMALL_VIEWS = "views=[{size: 32, count: 2}, {size: 16, count: 2, scale: [0.05, 0.14]}]"
CASES = {
    "caco, lars": (LARS,),
    "caco, sgd": (SGD,),
    "caco, adamw": (ADAMW,),
    "caco, views together": (LARS, "trainer.joint_views=on"),
    "caco, bf16": (LARS, "trainer.precision=bf16", "caco.operands=bf16"),
    "caco, project, multi-crop": (SGD, "caco.norm=project", SMALL_VIEWS),
    "moco": (SGD, "method=moco"),
    "moco, symmetric": (ADAMW, "method=moco", "moco.symmetric=true"),
}
FP16 = {"caco, fp16, lars": (LARS,), "caco, fp16, sgd": (SGD,), "caco, fp16, adamw": (ADAMW,), "moco, fp16": CASES["moco"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the looks at values that are taken on the CPU alone."""
    monkeypatch.setattr(bank_step.checks, "check_positive_range", lambda op, positives, bank_rows: None)
    monkeypatch.setattr(Trainer, "_require_finite", lambda self, step: None)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a scale that after every three steps rises so far that the next one overflows."""
    options = dict(init_scale=2.0**77, growth_factor=2.0**50, backoff_factor=2.0**-50, growth_interval=3)
    monkeypatch.setattr(training, "gradient_scaler", lambda precision, device: torch.amp.GradScaler("cpu", **options))


def make_trainer(images: Path, folder: Path, *settings: str, graph: StepGraph | None = None) -> Trainer:
    run = config(images, "evaluation.every_epochs=0", *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_step_graph", lambda config, device: graph)
        trainer = training.build_trainer(run, RunFolder(folder), CheckpointStore(folder / "checkpoints", keep=1), CPU)
    trainer.encoders.train()
    trainer.method.train()
    return trainer


def batch_at(step: int, sizes: Sequence[int]) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch([torch.randn(8, 3, size, size, generator=generator) for size in sizes], torch.arange(8))


def rates_at(step: int) -> Rates:
    return Rates(lr=0.05 / (1 + step), key_momentum=0.9 + 0.004 * step, warmup=(1 + step) / 30)


def losses(trainer: Trainer, sizes: Sequence[int] = (32, 32)) -> list[float]:
    """Of the steps before the capture and STEPS more."""
    found = []
    for step in range(WARMUP_STEPS + STEPS):
        trainer._interval.clear()
        trainer._step(batch_at(step, sizes), trainer.method, rates_at(step))
        found.append(float(trainer._interval.sums["loss"]))
    return found


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    found = {f"encoders.{name}": value for name, value in trainer.encoders.state_dict().items()}
    found |= {f"method.{name}": value for name, value in trainer.method.named_buffers()}
    for at, state in enumerate(trainer.optimizer.state.values()):
        found |= {f"optimizer.{at}.{name}": value for name, value in state.items()}
    found |= {"skipped": trainer.skipped_steps}
    return {name: value.detach().clone() for name, value in found.items()}


def different(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(found[name], value)]


def assert_replays_are_steps(images: Path, folder: Path, settings: tuple[str, ...]) -> Trainer:
    """The trainer of the replays."""
    recorder = Recorder()
    captured = make_trainer(images, folder / "a", *settings, graph=StepGraph(CPU, recorder, WARMUP_STEPS))
    plain = make_trainer(images, folder / "b", *settings, graph=StepGraph(CPU, Recorder(), NEVER))
    sizes = (32, 32, 16, 16) if SMALL_VIEWS in settings else (32, 32)
    assert losses(captured, sizes) == losses(plain, sizes)
    assert different(state_of(captured), state_of(plain)) == []
    assert recorder.replays == STEPS
    return captured


@pytest.mark.parametrize("case", CASES)
def test_replays_are_steps(case, images, tmp_path, like_a_gpu):
    assert_replays_are_steps(images, tmp_path, CASES[case])


@pytest.mark.parametrize("case", FP16)
def test_replays_skip_the_steps_that_overflow(case, images, tmp_path, like_a_gpu, scaled):
    captured = assert_replays_are_steps(images, tmp_path, FP16[case])
    # The three steps before the capture do not overflow.
    assert 0 < int(captured.skipped_steps) < STEPS


@pytest.mark.parametrize("settings", [(LARS,), (SGD,), ("method=moco", LARS)], ids=["lars", "sgd", "moco"])
def test_rates_on_the_device_are_the_rates(settings, images, tmp_path, like_a_gpu):
    """Against the trainer without a graph, to rounding, while training has not made that grow."""
    plain = make_trainer(images, tmp_path / "a", *settings)
    on_device = make_trainer(images, tmp_path / "b", *settings, graph=StepGraph(CPU, Recorder(), NEVER))
    assert losses(on_device)[:4] == pytest.approx(losses(plain)[:4], rel=1e-5)


@pytest.mark.parametrize("name", Rates._fields)
def test_a_rate_that_the_host_keeps_is_found(name, images, tmp_path, like_a_gpu):
    """The proof itself: a number in place of the tensor is replayed as it was, and the losses show it."""
    captured, plain = (
        make_trainer(images, tmp_path / folder, LARS, graph=StepGraph(CPU, Recorder(), warmup))
        for folder, warmup in (("a", WARMUP_STEPS), ("b", NEVER))
    )
    for trainer in (captured, plain):
        on_the_host(trainer, name)
    found, wanted = losses(captured), losses(plain)
    assert found[: WARMUP_STEPS + 1] == wanted[: WARMUP_STEPS + 1]
    assert found[-5:] != wanted[-5:]


def on_the_host(trainer: Trainer, name: str) -> None:
    """Its steps take the named rate as a number."""
    compute = trainer._compute

    def with_number(views: Sequence[Tensor], objective: Any, rates: Rates) -> None:
        number = getattr(rates_at(trainer.position.step), name)
        compute(views, objective, rates._replace(**{name: number}))

    trainer._compute = with_number


# What the host waits for


@pytest.mark.parametrize("settings", [(LARS,), (SGD,), (LARS, "trainer.joint_views=on"), ("method=moco", SGD)], ids=str)
def test_a_step_without_a_log_line_makes_the_host_wait_for_nothing(settings, images, tmp_path, like_a_gpu):
    trainer = make_trainer(images, tmp_path, *settings)
    losses(trainer)
    with NoHostWaits():
        for step in range(2):
            trainer._step(batch_at(step, (32, 32)), trainer.method, rates_at(step))
        # The same ears hear a log line.
        with pytest.raises(HostWait, match="tolist"):
            trainer._interval.means()


def test_a_wait_within_an_operation_is_heard():
    """The check of indices, which is made on the CPU alone."""
    bank, rows = torch.randn(5, 3), torch.randn(2, 3)
    one, positives = torch.ones(2), torch.zeros(2, 1, dtype=torch.int64)
    settings = dict(temperature=1.0, lr=1.0, momentum=0.0, row_weight=one, positives=positives)
    with NoHostWaits(), pytest.raises(HostWait, match="item"):
        bank_step.bank_step_(bank, torch.zeros(5, 3), rows, one, **settings)


# In a run


def test_a_run_goes_on_where_it_was_stopped(images, tmp_path, like_a_gpu, monkeypatch):
    """Bit for bit, with captures of their own before and after; the bank's initialisation is never captured."""
    recorders: list[Recorder] = []

    def build(config: TrainerConfig, device: torch.device) -> StepGraph:
        recorders.append(Recorder())
        return StepGraph(device, recorders[-1], WARMUP_STEPS)

    monkeypatch.setattr(training, "build_step_graph", build)
    settings = (ADAMW, "trainer.epochs=3", "evaluation.every_epochs=0", "trainer.log_every=2")
    training.train(config(images, *settings), tmp_path / "whole")
    training.train(config(images, *settings, "trainer.max_steps=12"), tmp_path / "parts")
    training.train(config(images, *settings), tmp_path / "parts", resume="auto")
    whole, parts = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    # 5 steps of initialisation, 15 of training; the resumed run warms up again.
    assert [recorder.replays for recorder in recorders] == [12, 4, 5]


def test_a_checkpoint_goes_on_with_and_without_the_graph(images, tmp_path, like_a_gpu):
    """The optimiser's form is the run's own, not the checkpoint's."""
    graphs = [StepGraph(CPU, Recorder(), WARMUP_STEPS), None]
    trainers = [make_trainer(images, tmp_path / str(at), ADAMW, graph=graph) for at, graph in enumerate(graphs)]
    for trainer in trainers:
        losses(trainer)
    for saved, other in (trainers, trainers[::-1]):
        other.load_state_dict(saved.state_dict(), "a checkpoint")
        other.position.step = 0
        assert other.optimizer.param_groups[0]["fused"] is (True if other.graph else None)
        assert other.optimizer.param_groups[0]["capturable"] is (other.graph is not None)
        assert isinstance(other.optimizer.param_groups[0]["lr"], float)
        losses(other)


def test_it_needs_a_gpu(images, tmp_path):
    with pytest.raises(UserError, match="trainer.cuda_graph: it needs a GPU, found cpu; set it to off"):
        training.train(config(images, "trainer.cuda_graph=true"), tmp_path)


def test_not_with_an_optimiser_that_reads_its_lr_on_the_host():
    settings = OptimizerConfig("sgd", apex="on")
    with pytest.raises(UserError, match="FusedSGD reads its lr on the host"):
        build_optimizer(settings, [torch.ones(2)], 256, captured=True)


