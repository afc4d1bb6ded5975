"""Steps with other views and rates each time, of trainers with and without a graph, and what they leave behind."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from caco_fast import build
from caco_fast.data import Batch
from caco_fast.distributed import rank
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.step import Rates
from caco_fast.engine.step_graph import WARMUP_STEPS, Capture
from caco_fast.engine.trainer import Trainer
from tests.engine.replay import Recorder
from tests.engine.tiny_run import config

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
    "caco, parts, clipped": (LARS, "trainer.accumulate=2", "trainer.clip_gradient=0.1"),
    "adco, symmetric": (SGD, "method=adco", "adco.symmetric=true"),
    "adco, multi-crop": (LARS, "method=adco", SMALL_VIEWS, "adco.bank_warmup=true"),
    "moco": (SGD, "method=moco"),
    "moco, symmetric": (ADAMW, "method=moco", "moco.symmetric=true"),
    "simclr, lr in the velocity": ("optimizer={lr: 0.3, scale_lr: false, lr_in_velocity: true}", "method=simclr"),
    "nnclr": (SGD, "method=nnclr", "nnclr={queue_size: 37, predictor_hidden: 16}"),
    "clae over caco": (SGD, "method=clae", "clae.base=caco"),
    "cacr": (SGD, "method=cacr"),
    "cacr, queue": (SGD, "method=cacr", "cacr={form: queue, queue_size: 37}"),
    "cacr, global, multi-crop": (LARS, "method=cacr", "cacr={form: global, predictor_hidden: 16}", SMALL_VIEWS),
    "ablation, queue and batch": (SGD, "method=ablation", "ablation={positives: queue, negatives: batch}"),
    "ablation, queue and bank": (SGD, "method=ablation", "ablation={positives: queue, negatives: bank}"),
}


def make_trainer(
    images: Path,
    folder: Path,
    *settings: str,
    capture: tuple[Capture, int] | None = None,
    device: torch.device = CPU,
) -> Trainer:
    run = config(images, "evaluation.every_epochs=0", *settings)
    store = CheckpointStore(folder / "checkpoints", keep=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_capture", lambda config, device: capture)
        trainer = build.build_trainer(build.settled(run, device), RunFolder(folder), store, device)
    trainer.encoders.train()
    trainer.method.train()
    trainer.step.enter(trainer.phases[-1])
    return trainer


def batch_at(step: int, sizes: Sequence[int]) -> Batch:
    generator = torch.Generator().manual_seed(1000 * rank() + step)
    return Batch([torch.randn(8, 3, size, size, generator=generator) for size in sizes], torch.arange(8))


def rates_at(step: int) -> Rates:
    return Rates(lr=0.05 / (1 + step), key_momentum=0.9 + 0.004 * step, warmup=(1 + step) / 30)


def losses(trainer: Trainer, sizes: Sequence[int] = (32, 32), steps: int = WARMUP_STEPS + STEPS) -> list[float]:
    """After every step the sum since the last log line, one in three steps."""
    found = []
    for step in range(steps):
        if step % 3 == 0:
            trainer.step.interval.clear()
        trainer.step(batch_at(step, sizes).views, rates_at(step))
        found.append(float(trainer.step.interval.sums["loss"]))
    return found


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    found = {f"encoders.{name}": value for name, value in trainer.encoders.state_dict().items()}
    found |= {f"method.{name}": value for name, value in trainer.method.named_buffers()}
    for at, state in enumerate(trainer.step.optimizer.state.values()):
        found |= {f"optimizer.{at}.{name}": value for name, value in state.items()}
    found |= {"skipped": trainer.step.skipped_steps}
    return {name: value.detach().clone() for name, value in found.items()}


def different(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(found[name], value)]


def assert_replays_are_steps(images: Path, folder: Path, settings: tuple[str, ...]) -> Trainer:
    """The trainer of the replays."""
    recorder = Recorder()
    captured = make_trainer(images, folder / "a", *settings, capture=(recorder, WARMUP_STEPS))
    plain = make_trainer(images, folder / "b", *settings, capture=(Recorder(), NEVER))
    sizes = (32, 32, 16, 16) if SMALL_VIEWS in settings else (32, 32)
    assert losses(captured, sizes) == losses(plain, sizes)
    assert different(state_of(captured), state_of(plain)) == []
    assert recorder.replays == STEPS
    return captured
