"""A captured step: replays give what steps launched one by one give, bit for bit, with other views and rates each time.

On the CPU by tests/engine/replay.py in place of CUDA graphs; on a GPU by themselves.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from caco_fast import build, training
from caco_fast.distributed import rank
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.settings import TrainerConfig
from caco_fast.engine.state import Interval
from caco_fast.engine.step import Rates
from caco_fast.engine.step_graph import WARMUP_STEPS, WARMUP_STEPS_OF_RANKS, Capture, CapturedStep, CudaCapture
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError
from caco_fast.ops import bank_step
from caco_fast.optim import OptimizerConfig, build_optimizer
from tests.engine.graph_steps import (
    ADAMW,
    CASES,
    LARS,
    NEVER,
    SGD,
    SMALL_VIEWS,
    STEPS,
    assert_replays_are_steps,
    batch_at,
    different,
    losses,
    make_trainer,
    rates_at,
    state_of,
)
from tests.engine.replay import HostWait, NoHostWaits, Recorder
from tests.engine.tiny_run import config
from tests.ranks import run_ranks
from tests.tool import load_tool

prove_switches = load_tool("check/switches")

FP16 = ("caco, lars", "caco, sgd", "caco, adamw", "moco")


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the looks at values that are taken on the CPU alone."""
    monkeypatch.setattr(bank_step, "check_positive_range", lambda positives, bank_rows: None)
    monkeypatch.setattr(Interval, "require_finite", lambda self: None)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a scale that after every three steps rises so far that the next one overflows."""
    options = dict(init_scale=2.0**77, growth_factor=2.0**50, backoff_factor=2.0**-50, growth_interval=3)
    monkeypatch.setattr(build, "gradient_scaler", lambda precision, device: torch.amp.GradScaler("cpu", **options))


@pytest.mark.parametrize("case", CASES)
def test_replays_are_steps(case, images, tmp_path, like_a_gpu):
    assert_replays_are_steps(images, tmp_path, CASES[case])


@pytest.mark.parametrize("case", FP16)
def test_replays_skip_the_steps_that_overflow(case, images, tmp_path, like_a_gpu, scaled):
    captured = assert_replays_are_steps(images, tmp_path, CASES[case])
    # The three steps before the capture do not overflow.
    assert 0 < int(captured.step.skipped_steps) < STEPS


@pytest.mark.parametrize("settings", [(LARS,), (SGD,), ("method=moco", LARS)], ids=["lars", "sgd", "moco"])
def test_rates_on_the_device_are_the_rates(settings, images, tmp_path, like_a_gpu):
    """Against the trainer without a graph, to rounding, while training has not made that grow."""
    plain = make_trainer(images, tmp_path / "a", *settings)
    on_device = make_trainer(images, tmp_path / "b", *settings, capture=(Recorder(), NEVER))
    assert losses(on_device)[:4] == pytest.approx(losses(plain)[:4], rel=1e-5)


@pytest.mark.parametrize("name", Rates._fields)
def test_a_rate_that_the_host_keeps_is_found(name, images, tmp_path, like_a_gpu):
    """The proof itself: a number in place of the tensor is replayed as it was, and the losses show it."""
    captured, plain = (
        make_trainer(images, tmp_path / folder, LARS, capture=(Recorder(), warmup))
        for folder, warmup in (("a", WARMUP_STEPS), ("b", NEVER))
    )
    for trainer in (captured, plain):
        on_the_host(trainer, name)
    found, wanted = losses(captured), losses(plain)
    assert found[: WARMUP_STEPS + 1] == wanted[: WARMUP_STEPS + 1]
    assert found[-5:] != wanted[-5:]


def on_the_host(trainer: Trainer, name: str) -> None:
    """The trainer's steps take the named rate as a number."""
    step, compute = trainer.step, trainer.step.compute
    done = itertools.count()

    def with_number(views: Sequence[Tensor], rates: Rates) -> None:
        compute(views, rates._replace(**{name: getattr(rates_at(next(done)), name)}))

    step.compute = with_number


# Several ranks


def steps_of_a_rank(images: Path, folder: Path, *settings: str) -> tuple[bool, list[str], int]:
    """In a process of its own: whether the losses are equal, what is not of the state, and the replays."""
    bank_step.check_positive_range = lambda positives, bank_rows: None
    Interval.require_finite = lambda self: None
    # gloo's own copies its result when the host waits for it, which is no operation of the collective.
    dist.reduce_scatter_tensor = reduce_scatter
    recorder, found = Recorder(), []
    for at, capture in enumerate([(recorder, WARMUP_STEPS_OF_RANKS), (Recorder(), NEVER)]):
        trainer = make_trainer(images, folder / f"{at} {rank()}", *settings, capture=capture)
        found.append((losses(trainer, steps=WARMUP_STEPS_OF_RANKS + STEPS), state_of(trainer)))
    (captured, state), (plain, wanted) = found
    return captured == plain, different(state, wanted), recorder.replays


def reduce_scatter(own: Tensor, rows: Tensor) -> None:
    whole = rows.clone()
    dist.all_reduce(whole)
    own.copy_(whole.chunk(dist.get_world_size())[rank()])


OF_RANKS = {
    "sharded": (LARS,),
    "replicated": (ADAMW, "caco.bank_parallel=replicated"),
    "moco": (SGD, "method=moco"),
    "moco, keys shuffled": (SGD, "method=moco", "trainer.batch_norm_images=4"),
}


@pytest.mark.parametrize("settings", OF_RANKS.values(), ids=OF_RANKS)
def test_replays_on_two_ranks_are_steps(settings, images, tmp_path):
    """With DistributedDataParallel and the collectives of BatchNorm, bank and queue; each rank has its own views."""
    assert run_ranks(steps_of_a_rank, 2, images, tmp_path, *settings) == [(True, [], STEPS)] * 2


# What the host waits for


@pytest.mark.parametrize("settings", [(LARS,), (SGD,), (LARS, "trainer.joint_views=on"), ("method=moco", SGD)], ids=str)
def test_a_step_without_a_log_line_makes_the_host_wait_for_nothing(settings, images, tmp_path, like_a_gpu):
    trainer = make_trainer(images, tmp_path, *settings)
    losses(trainer)
    with NoHostWaits():
        for step in range(2):
            trainer.step(batch_at(step, (32, 32)).views, rates_at(step))
        # The same ears hear a log line.
        with pytest.raises(HostWait, match="tolist"):
            trainer.step.interval.means()


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

    def recorded(config: TrainerConfig, device: torch.device) -> tuple[Capture, int]:
        recorders.append(Recorder())
        return recorders[-1], WARMUP_STEPS

    monkeypatch.setattr(build, "build_capture", recorded)
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
    captures = [(Recorder(), WARMUP_STEPS), None]
    trainers = [make_trainer(images, tmp_path / str(at), ADAMW, capture=c) for at, c in enumerate(captures)]
    for trainer in trainers:
        losses(trainer)
    for saved, other in (trainers, trainers[::-1]):
        other.load_state_dict(saved.state_dict(), "a checkpoint")
        captured, (group,) = isinstance(other.step, CapturedStep), other.step.optimizer.param_groups
        assert group["fused"] is (True if captured else None)
        assert group["capturable"] is captured
        assert isinstance(group["lr"], float)
        losses(other)


def test_it_needs_a_gpu(images, tmp_path):
    with pytest.raises(UserError, match="trainer.cuda_graph: it needs a GPU, found cpu; set it to false"):
        training.train(config(images, "trainer.cuda_graph=true"), tmp_path)


def test_not_with_an_optimiser_that_reads_its_lr_on_the_host():
    settings = OptimizerConfig("sgd", apex="on")
    with pytest.raises(UserError, match="FusedSGD reads its lr on the host"):
        build_optimizer(settings, [torch.ones(2)], 256, captured=True)


# On a GPU

ON_A_GPU = (("caco, lars", "f32"), ("caco, lars", "fp16"), ("caco, sgd", "fp16"), ("caco, adamw", "bf16"))
ON_A_GPU += (("caco, project, multi-crop", "bf16"), ("moco", "bf16"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("case, precision", ON_A_GPU)
def test_replays_on_a_gpu_are_steps_to_rounding(case, precision, images, tmp_path):
    """50 steps, against the same steps from weights moved by one unit in the last place (tools/check/switches.py)."""
    device, settings = torch.device("cuda", 0), (*CASES[case], f"trainer.precision={precision}")
    sizes = (32, 32, 16, 16) if SMALL_VIEWS in settings else (32, 32)

    def run(name: str, warmup: int, moved: int = 0) -> list[float]:
        capture = (CudaCapture(device), warmup)
        trainer = make_trainer(images, tmp_path / name, *settings, capture=capture, device=device)
        if moved:
            prove_switches.move(trainer.encoders.query.parameters(), moved)
            trainer.encoders.copy_query_to_key()
        return losses(trainer, sizes, steps=50)

    moved = [run(f"moved {seed}", NEVER, seed) for seed in (1, 2)]
    assert prove_switches.judge(run("captured", WARMUP_STEPS), run("plain", NEVER), moved)["equal"]


def test_no_captured_graph_outlives_the_end_of_a_run(images, tmp_path, like_a_gpu):
    """NCCL waits at its end for graphs that hold its collectives."""
    graphs: list[weakref.ref[Callable[[], None]]] = []

    class Remembered(Recorder):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            replay = super().capture(work)

            def graph() -> None:
                replay()

            graphs.append(weakref.ref(graph))
            return graph

    trainer = make_trainer(images, tmp_path, LARS, capture=(Remembered(), WARMUP_STEPS))
    losses(trainer, steps=WARMUP_STEPS + 2)
    assert [graph() is None for graph in graphs] == [False]
    trainer.close()
    assert [graph() is None for graph in graphs] == [True]
