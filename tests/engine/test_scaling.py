"""fp16: steps that overflow leave optimiser, key encoder and bank as they were, and embeddings and losses are f32.

A GradScaler works on the CPU too. The Trainer gets one here, although `trainer.precision=fp16` requires a GPU.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from caco_fast import build, training
from caco_fast.bank import KeyQueue
from caco_fast.data import Batch
from caco_fast.distributed import rank
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.precision import require_scale
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.step import Rates
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError
from caco_fast.methods import CaCoLoss
from caco_fast.optim import build_optimizer
from tests.engine.tiny_run import config
from tests.ranks import run_ranks

CPU = torch.device("cpu")
OPTIMIZERS = ("{name: lars, lr: 0.3, scale_lr: false}", "{name: sgd, lr: 0.03}", "{name: adamw, lr: 0.003}")
METHODS = ("caco", "moco")
RATES = Rates(lr=0.05, key_momentum=0.9, warmup=0.5)


def make_trainer(images: Path, folder: Path, *settings: str) -> Trainer:
    """A trainer of f32 encoders under a scaler."""
    run = config(images, "evaluation.every_epochs=0", *settings)
    trainer = build.build_trainer(
        build.settled(run, CPU), RunFolder(folder), CheckpointStore(folder / "checkpoints", keep=1), CPU
    )
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.step.optimizer = build_optimizer(
        run.optimizer, trainer.encoders.query.parameters(), run.trainer.batch_size, scaled=True
    )
    trainer.encoders.train()
    trainer.method.train()
    return trainer


def make_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * seed + rank())
    return Batch([torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2)], torch.arange(4))


def step(trainer: Trainer, seed: int, overflow: bool, prepare: bool = False) -> None:
    """One step, with a gradient that is infinite in one place or not."""
    weight = next(trainer.encoders.query.parameters())
    hook = weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), torch.inf) if overflow else grad)
    phase = trainer.phases[0 if prepare else -1]
    if trainer.step.phase is not phase:
        trainer.step.enter(phase)
    trainer.step(make_batch(seed).views, RATES)
    hook.remove()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that a skipped step must leave alone: everything but the running statistics of BatchNorm."""
    found = {f"encoders.{name}": value for name, value in trainer.encoders.named_parameters()}
    found |= {f"method.{name}": value for name, value in trainer.method.named_buffers()}
    for at, state in enumerate(trainer.step.optimizer.state.values()):
        found |= {f"optimizer.{at}.{name}": value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda text: text.split()[1].rstrip(","))
@pytest.mark.parametrize("method", METHODS)
def test_training_with_skipped_steps_is_training_without_them(images, tmp_path, method, optimizer):
    """Bit for bit, wherever they come: before the first step, alone, two in a row."""
    settings = (f"method={method}", f"optimizer={optimizer}")
    skipping, plain = (make_trainer(images, tmp_path / name, *settings) for name in ("skipping", "plain"))
    start = state_of(plain)
    for seed, overflow in enumerate((True, False, True, False, True, True, False)):
        step(skipping, seed, overflow)
        if not overflow:
            step(plain, seed, overflow)
    assert_same(state_of(skipping), state_of(plain))
    assert int(skipping.step.skipped_steps) == 4 and int(plain.step.skipped_steps) == 0
    assert skipping.step.interval.steps == 7
    assert skipping.step.scaler.get_scale() == 1024 / 2**4
    unmoved = [name for name, value in start.items() if torch.equal(value, state_of(plain)[name])]
    assert [name for name in unmoved if not name.endswith(("next_row", "skipped_rows"))] == []


def test_a_skipped_step_of_the_initialisation_fills_nothing(images, tmp_path):
    trainer = make_trainer(images, tmp_path)
    before = state_of(trainer)
    step(trainer, 0, overflow=True, prepare=True)
    after = state_of(trainer)
    assert_same({name: after[name] for name in before}, before)
    step(trainer, 1, overflow=False, prepare=True)
    assert int(trainer.method.next_row) == 4
    assert not torch.equal(trainer.method.bank.bank[:4], before["method.criterion.bank.bank"][:4])


def test_a_skipped_step_of_the_initialisation_is_made_up_for(images, tmp_path, monkeypatch):
    """No row of the bank stays as it was drawn."""
    trainer = make_trainer(images, tmp_path, "trainer.epochs=1")
    trainer.step.scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**127, backoff_factor=2.0**-117, growth_interval=10**6
    )
    drawn = trainer.method.bank.bank.clone()
    monkeypatch.setattr(trainer, "_save", lambda: None)
    trainer.phases = trainer.phases[:1]
    trainer.metrics.open()
    trainer.run()
    assert int(trainer.step.skipped_steps) == 1 and trainer.position.total_steps == 6
    assert not (trainer.method.bank.bank == drawn).all(dim=1).any()
    trainer.close()


def test_a_skipped_enqueue_keeps_the_oldest_keys_in_turn():
    queue, flag = KeyQueue(5, 3), torch.tensor(1.0)
    before = queue.queue.clone()
    queue.enqueue(torch.full((2, 3), torch.nan), skip=flag)
    assert torch.equal(queue.queue, before) and int(queue.pointer) == 0
    queue.enqueue(torch.ones(2, 3), skip=flag - 1)
    assert torch.equal(queue.queue[:2], torch.ones(2, 3)) and int(queue.pointer) == 2


# Several ranks


def on_two_ranks(images: Path, folder: Path) -> dict[str, Any]:
    """Steps 0..3, of which the first and the third overflow, each on one rank only."""
    trainer = make_trainer(images, folder / str(rank()))
    for seed in range(4):
        step(trainer, seed, overflow=(seed, rank()) in ((0, 1), (2, 0)))
    return {
        "state": state_of(trainer),
        "skipped": int(trainer.step.skipped_steps),
        "scale": trainer.step.scaler.get_scale(),
    }


def without_overflow(images: Path, folder: Path) -> dict[str, Any]:
    trainer = make_trainer(images, folder / str(rank()))
    for seed in (1, 3):
        step(trainer, seed, overflow=False)
    return {"state": state_of(trainer)}


def both(images: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return on_two_ranks(images, folder / "overflow"), without_overflow(images, folder / "plain")


def test_an_overflow_on_one_rank_is_skipped_on_all(images, tmp_path):
    for found, plain in run_ranks(both, 2, images, tmp_path):
        assert found["skipped"] == 2 and found["scale"] == 1024 / 4
        assert_same(found["state"], plain["state"])


# Whole runs, in fp16 on the CPU


def run_in_fp16(monkeypatch: pytest.MonkeyPatch, images: Path, folder: Path, *settings: str, resume: str = "never"):
    """With so large a scale that the scaled loss of the first step overflows, and after that none."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117, growth_interval=10**6)
    monkeypatch.setattr(build, "gradient_scaler", lambda precision, device: scaler)
    monkeypatch.setattr(build, "autocast_dtype", lambda precision, device: torch.float16)
    return training.train(config(images, "evaluation.every_epochs=0", "trainer.epochs=1", *settings), folder, resume)


def test_a_run_in_fp16_logs_its_skipped_steps_and_goes_on_after_a_stop(images, tmp_path, monkeypatch):
    assert run_in_fp16(monkeypatch, images, tmp_path / "whole")["finished"]
    lines = [line for line in read_metrics(tmp_path / "whole") if "loss" in line]
    # 37 rows at batch 8 fill in 5 steps beside the skipped one; then an epoch of 5 steps.
    assert [line["skipped_steps"] for line in lines] == [1] * 11
    assert [line["loss_scale"] for line in lines] == [1024.0] * 11
    run_in_fp16(monkeypatch, images, tmp_path / "parts", "trainer.max_steps=3")
    run_in_fp16(monkeypatch, images, tmp_path / "parts", resume="auto")
    again = [line for line in read_metrics(tmp_path / "parts") if "loss" in line]
    for name in ("loss", "skipped_steps", "loss_scale"):
        assert [line[name] for line in again] == [line[name] for line in lines]


def test_a_run_in_f32_has_no_such_lines(images, tmp_path):
    training.train(config(images, "evaluation.every_epochs=0", "trainer.max_steps=1"), tmp_path)
    (line,) = (line for line in read_metrics(tmp_path) if "loss" in line)
    assert not {"skipped_steps", "loss_scale"} & line.keys()


def test_a_scale_at_which_nothing_succeeds_ends_the_run():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-11)
    scaler.scale(torch.ones(1))
    with pytest.raises(UserError, match="fp16 gradients are not finite at step 9 .* lower optimizer.lr"):
        require_scale(scaler, 9)
    require_scale(torch.amp.GradScaler("cpu", enabled=False), 9)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["f32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_the_embeddings_in_f32(images, tmp_path, method, autocast):
    """In every precision of the encoders: unit rows in f32, and the loss in f64 of these rows, to f32 rounding."""
    trainer = make_trainer(images, tmp_path, f"method={method}")
    encoders, given = trainer.encoders, {}
    for name, encoder in (("queries", encoders.query), ("keys", encoders.key)):
        encoder.autocast = autocast
        encoder.register_forward_hook(lambda _module, _views, rows, name=name: given.update({name: rows}))
    output = trainer.method(make_batch(0).views, encoders)
    assert output.loss.dtype == torch.float32
    for rows in (*given["queries"], *given["keys"]):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    queries, keys = ([rows.double() for rows in given[name]] for name in ("queries", "keys"))
    if method == "caco":
        criterion = CaCoLoss(trainer.method.bank.double(), 0.08, 0.08, operands=torch.float64)
        wanted = criterion(*queries, *keys)
    else:
        rows = torch.cat([keys[0].unsqueeze(1), trainer.method.queue.queue.double().expand(4, -1, -1)], dim=1)
        logits = (rows @ queries[0].unsqueeze(2)).squeeze(2) / 0.2  # [B, 1 + K], its own key first
        wanted = cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=0)
