"""The README's examples run as they stand there, and its tables are those of the results."""

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: ([^>]+) -->\n```python\n(.*?)```", README, re.S))


def test_the_own_loop_learns(capsys):
    exec(compile(EXAMPLES["own loop"], "README: own loop", "exec"), {})
    lines = capsys.readouterr().out.strip().splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    positive = [float(line.split("positive ")[1]) for line in lines]
    assert len(losses) == 39
    # From the bank being full on: it fits the encoder's queries better and better.
    assert sum(losses[-5:]) < sum(losses[4:9])
    assert sum(positive[-5:]) > sum(positive[4:9])


def stand_ins() -> dict[str, types.ModuleType]:
    """What the example takes from lightly, for machines without it."""

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
        "lightly.utils.scheduler": {"cosine_schedule": lambda step, steps, start, end: end},
    }
    modules = {name: types.ModuleType(name) for name in ("lightly", "lightly.models", "lightly.utils", *names)}
    for name, contents in names.items():
        vars(modules[name]).update(contents)
    return modules


def test_the_lightly_loop_runs(monkeypatch):
    try:
        import lightly  # noqa: F401
    except ImportError:
        for name, module in stand_ins().items():
            monkeypatch.setitem(sys.modules, name, module)
    batches = [((torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32)), torch.zeros(8)) for _ in range(2)]
    names = {"dataloader": batches}
    exec(compile(EXAMPLES["lightly style"], "README: lightly style", "exec"), names)
    assert torch.isfinite(names["loss"]) and names["bank"].velocity.any()


def test_every_named_file_exists():
    named = re.findall(r"`((?:caco_fast/configs/|tools/|docs/|benchmarks/)[\w./-]+\.(?:py|yaml|json|md))`", README)
    named += re.findall(r"\]\(([\w./-]+)\)", README) + [
        f"caco_fast/configs/{name}" for name in re.findall(r"^\| `(\w+\.yaml)` \|", README, re.M)
    ]
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench/tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_list_of_results_names_the_gpu_that_checked_the_kernels(tmp_path: Path, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "tools" / "bench/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert "On a GPU" in tables.results() or "stages passed" in tables.results()
    record = {
        "script": "tools/check/gpu.py",
        "machine": {"gpus": ["NVIDIA H200"], "cpu": "some CPU"},
        "commit": "0123456789abcdef",
        "dirty": True,
        "time": "2030-01-02T03:04:05+00:00",
        "settings": {"csrc_hash": "feedbeef"},
        "results": {"stages": {"primitives": {"status": "passed"}, "tests": {"status": "failed: 1"}}},
    }
    (tmp_path / "gpu_check_nvidia_h200.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    listed = tables.results()
    assert "| Proves the kernels on the GPU of this machine" in listed
    assert "| NVIDIA H200 | 2030-01-02 | 0123456 with changes |" in listed
    assert listed.endswith("`csrc/` with the content hash feedbeef on NVIDIA H200: 1 of 2 stages passed.")
