"""On a GPU a training step never makes the host wait for the device; log lines and checkpoints alone read from it."""

import warnings
from pathlib import Path

import pytest
import torch

from caco_fast.build import build_trainer, settled
from caco_fast.data import Batch
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.step import Rates
from caco_fast.engine.step_graph import WARMUP_STEPS
from caco_fast.engine.trainer import Trainer
from tests.engine.tiny_run import config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

RATES = Rates(lr=0.05, key_momentum=0.9, warmup=0.5)
STEPS = WARMUP_STEPS + 1
CASES = {
    "caco": ("trainer.precision=bf16",),
    "caco, fp16": ("trainer.precision=fp16",),
    "caco, views together": ("trainer.precision=bf16", "trainer.joint_views=on"),
    "caco, sgd": ("optimizer={name: sgd, lr: 0.03}",),
    "caco, parts, clipped": ("trainer.precision=fp16", "trainer.accumulate=2", "trainer.clip_gradient=1.0"),
    "caco, activations twice": ("trainer.precision=bf16", "trainer.checkpoint_activations=true"),
    "adco": ("method=adco", "adco.symmetric=true", "trainer.precision=fp16"),
    "moco": ("method=moco", "moco.symmetric=true"),
    "moco, keys shuffled": ("method=moco", "trainer.batch_norm_images=2"),
    "simclr": ("method=simclr", "trainer.precision=bf16", "optimizer.lr_in_velocity=true"),
    "nnclr": ("method=nnclr", "nnclr.queue_size=37"),
    "clae, fp16": ("method=clae", "trainer.precision=fp16"),
    "clae over caco": ("method=clae", "clae.base=caco", "trainer.precision=bf16"),
    "replays, nnclr": ("trainer.cuda_graph=true", "method=nnclr", "nnclr.queue_size=37"),
    "replays, clae over caco": ("trainer.cuda_graph=true", "method=clae", "clae.base=caco"),
    "cacr": ("method=cacr", "trainer.precision=bf16"),
    "cacr, queue": ("method=cacr", "cacr={form: queue, queue_size: 37}"),
    "cacr, global": ("method=cacr", "cacr={form: global, predictor_hidden: 16}"),
    "replays, cacr, queue": ("trainer.cuda_graph=true", "method=cacr", "cacr={form: queue, queue_size: 37}"),
    "ablation, queue and batch": ("method=ablation", "ablation={positives: queue, negatives: batch}"),
    "ablation, queue and bank": ("method=ablation", "ablation={positives: queue, negatives: bank}"),
    "replays": ("trainer.cuda_graph=true", "trainer.precision=bf16"),
    "replays, fp16": ("trainer.cuda_graph=true", "trainer.precision=fp16"),
    "replays, adamw": ("trainer.cuda_graph=true", "optimizer={name: adamw, lr: 0.003}"),
    "replays, parts, clipped": ("trainer.cuda_graph=true", "trainer.accumulate=2", "trainer.clip_gradient=1.0"),
    "replays, adco": ("trainer.cuda_graph=true", "method=adco"),
    "replays, moco": ("trainer.cuda_graph=true", "method=moco"),
    "replays, keys shuffled": ("trainer.cuda_graph=true", "method=moco", "trainer.batch_norm_images=2"),
}


def make_trainer(images: Path, folder: Path, *settings: str) -> Trainer:
    run = config(images, "trainer.device=cuda", "evaluation.every_epochs=0", *settings)
    store = CheckpointStore(folder / "checkpoints", keep=1)
    trainer = build_trainer(settled(run, torch.device("cuda", 0)), RunFolder(folder), store, torch.device("cuda", 0))
    trainer.encoders.train()
    trainer.method.train()
    trainer.step.enter(trainer.phases[-1])
    return trainer


def waits(work: object) -> list[str]:
    """What torch says of each wait in `work`."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_a_log_line_does_not_wait(case: str, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(images, tmp_path, *CASES[case])
    views = [torch.randn(8, 3, 32, 32).pin_memory() for _ in range(2)]
    batch = Batch(views, torch.arange(8))

    def steps() -> None:
        for _ in range(STEPS):
            trainer.step(batch.views, RATES)

    steps()  # Libraries load, and states are made; of captured steps, all that precedes the replays.
    assert waits(steps) == []
    # The same ears hear a wait.
    assert len(waits(lambda: trainer.step.interval.sums["loss"].item())) == 1
    trainer.close()


def test_the_loader_by_torchvision_does_not_wait(images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(images, tmp_path, "data.loader=torchvision", "data.workers=1", "trainer.precision=bf16")
    taken: list[Batch] = []
    for epoch in (0, 1):
        batches = trainer.loader.batches(epoch)
        taken.append(next(batches))
        assert waits(lambda found=batches: taken.extend(found)) == [], "after the first batch of an epoch"
    assert len(taken) == 2 * trainer.loader.steps_per_epoch and taken[0].views[0].is_cuda
    trainer.close()
