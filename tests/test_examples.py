"""The scripts of examples/ run as files, and the own loop learns."""

import math
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from caco_fast import LearnableBank

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def test_the_own_loop_learns() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_loop.py")], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    positive = [float(line.split("positive ")[1]) for line in lines]
    assert len(losses) == 39
    # Once the bank is full of keys, it fits the encoder's queries better and better.
    assert sum(losses[-5:]) < sum(losses[4:9])
    assert sum(positive[-5:]) > sum(positive[4:9])


def batches_of_noise() -> list:
    return [((torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32)), torch.zeros(8)) for _ in range(2)]


def check_the_lightly_loop() -> None:
    torch.manual_seed(0)
    names = runpy.run_path(str(EXAMPLES / "lightly_loop.py"))
    filled: list[torch.Tensor] = []

    class Bank(LearnableBank):
        def fill(self, keys: torch.Tensor, start: int = 0, **options: Any) -> int:
            filled.append(torch.arange(start, min(start + len(keys), self.size)))
            return super().fill(keys, start, **options)

    # The globals of the function, because a script that has run keeps no module.
    names["train"].__globals__["LearnableBank"] = Bank
    _, bank, loss = names["train"](batches_of_noise(), epochs=2, bank_size=20)
    assert math.isfinite(loss)
    assert bank.velocity.any()
    # Keys have replaced every row once. The random rows resemble no image, so nearly all would stay out of use.
    assert torch.cat(filled).tolist() == list(range(20))


def test_the_lightly_loop_runs_on_lightly() -> None:
    pytest.importorskip("lightly", reason="lightly is not installed; the next test runs the loop on stand-ins")
    check_the_lightly_loop()


def stand_ins() -> dict[str, types.ModuleType]:
    """What the example imports from lightly, for machines without it."""

    def update_momentum(model: nn.Module, momentum_model: nn.Module, m: float) -> None:
        for ours, theirs in zip(momentum_model.parameters(), model.parameters()):
            ours.data.lerp_(theirs.data, 1 - m)

    class MoCoProjectionHead(nn.Sequential):
        def __init__(self, width: int, hidden: int, dim: int) -> None:
            super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    names = {
        "lightly.models.modules": {"MoCoProjectionHead": MoCoProjectionHead},
        "lightly.models.utils": {
            "deactivate_requires_grad": lambda model: model.requires_grad_(False),
            "update_momentum": update_momentum,
        },
        "lightly.transforms": {"MoCoV2Transform": None},
        "lightly.utils.scheduler": {"cosine_schedule": lambda step, steps, start, end: end},
    }
    modules = {name: types.ModuleType(name) for name in ("lightly", "lightly.models", "lightly.utils", *names)}
    for name, contents in names.items():
        vars(modules[name]).update(contents)
    return modules


def test_the_lightly_loop_runs_on_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)
    check_the_lightly_loop()
