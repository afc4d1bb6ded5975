"""A captured step on emulated kernels: a replay launches them anew with the addresses of then, and reads its rates."""

from pathlib import Path
from types import ModuleType

import pytest

from caco_fast.engine.state import Interval
from caco_fast.ops import bank_step
from tests.engine.graph_steps import LARS, assert_replays_are_steps
from tests.engine.replay import RecordedKernels, Recording
from tests.engine.tiny_run import write_images

BACKENDS = ("caco.backend=cuda", "moco.backend=cuda")


@pytest.mark.parametrize("path, method", [(70, "caco"), (90, "caco"), (90, "moco")], indirect=["path"])
def test_replays_of_kernels_are_steps(
    method: str, cuda_ops: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_step, "check_positive_range", lambda positives, bank_rows: None)
    monkeypatch.setattr(Interval, "require_finite", lambda self: None)
    monkeypatch.setattr(cuda_ops, "_C", RecordedKernels(cuda_ops._C))
    monkeypatch.setattr(cuda_ops, "capturing", lambda device: Recording.entered is not None)
    images = write_images(tmp_path / "images")
    assert_replays_are_steps(images, tmp_path, (LARS, *BACKENDS, f"method={method}"))
