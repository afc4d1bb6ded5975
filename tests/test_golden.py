"""Twenty steps of the quickstart give the recorded losses; `python tests/test_golden.py` records them anew."""

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from caco_fast import build
from caco_fast.config import load_config
from caco_fast.engine.metrics import read_metrics
from caco_fast.provenance import hardware, versions
from caco_fast.training import train

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "quickstart.json"
# Eight steps fill the bank, twelve train; f32 and one thread, for the same sums everywhere.
SETTINGS = (
    "caco.warm_start_steps=8",
    "trainer.precision=f32",
    "trainer.cpu_threads=1",
    "trainer.max_steps=20",
    "trainer.log_every=1",
    "evaluation.every_epochs=0",
    "evaluation.baselines=false",
    "evaluation.linear_probe=false",
    "run.tensorboard=false",
    "run.report=false",
    "run.plain=true",
)


def tolerance(step: int, same_machine: bool) -> float:
    """The relative tolerance: the recording machine repeats its losses; elsewhere BatchNorm and AdamW amplify rounding.

    Worst seen with two threads instead of one: 2e-6 at step 1, 6e-4 at step 4, 7e-2 at step 15.
    """
    return 1e-6 if same_machine else min(0.15, 2e-5 * 3**step)


def recorder() -> dict[str, str]:
    """The machine, as exactly as the sums depend on it: several processors go by the name of one."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    numbers = [re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("cpu family", "model", "stepping")]
    return {
        "cpu": str(hardware()["cpu"]),
        "family, model, stepping": ", ".join(found[1] for found in numbers if found),
        "torch": str(versions()["torch"]),
    }


def losses(folder: Path, *overrides: str) -> list[float]:
    train(load_config(ROOT / "caco_fast" / "configs" / "quickstart.yaml", (*SETTINGS, *overrides)), folder)
    return [line["loss"] for line in read_metrics(folder)]


def test_twenty_steps_of_the_quickstart(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    found = losses(tmp_path / "run")
    assert len(found) == len(golden["losses"]) == 20
    same = recorder() == golden["recorder"]
    for step, (loss, wanted) in enumerate(zip(found, golden["losses"]), 1):
        assert loss == pytest.approx(wanted, rel=tolerance(step, same)), f"step {step}"


def test_bf16_views_give_the_losses_of_f32_views(tmp_path, monkeypatch):
    """Autocast casts what the first convolution is given, and a cast of what is cast already changes nothing."""
    build_loader, given = build.build_train_loader, []
    # Two steps of the initialisation and two of training: a processor without bf16 instructions takes seconds a step.
    short = ("trainer.precision=bf16", "trainer.batch_size=64", "caco.warm_start_steps=2", "trainer.max_steps=4")
    found = losses(tmp_path / "bf16", *short)

    def build_in_f32(*arguments, dtype, **options):
        given.append(dtype)
        return build_loader(*arguments, **options)

    monkeypatch.setattr(build, "build_train_loader", build_in_f32)
    assert losses(tmp_path / "f32", *short) == found
    assert given == [torch.bfloat16]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder) / "run")
    GOLDEN.write_text(json.dumps({"recorder": recorder(), "losses": found}, indent=1) + "\n")
    print(f"{len(found)} losses recorded in {GOLDEN}", file=sys.stderr)
