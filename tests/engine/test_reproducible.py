"""Same seed, same losses, bit for bit: on a GPU by `trainer.deterministic`."""

import os

import pytest
import torch

from caco_fast.engine.launch import launched
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.settings import TrainerConfig
from caco_fast.errors import UserError
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_the_setting_holds_for_the_run(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with launched(TrainerConfig(device="cpu", deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with launched(TrainerConfig(device="cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_named(tmp_path, monkeypatch):
    def refused(*_):
        raise RuntimeError("some_backward_cuda does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr("caco_fast.training.build_trainer", refused)
    images = write_images(tmp_path / "images")
    with pytest.raises(UserError, match=r"trainer.deterministic: some_backward_cuda is not on cpu; take .*=false"):
        train(config(images, "trainer.deterministic=true"), tmp_path / "run")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", ["caco", "moco"])
def test_two_runs_give_the_same_bits(tmp_path, device, method):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    images = write_images(tmp_path / "images")
    # A stem with pooling, as ResNet-50 has, and bf16 where the kernels of the bank run.
    settings = [f"method={method}", f"trainer.device={device}", "trainer.deterministic=true", "backbone.stem=imagenet"]
    settings += ["trainer.precision=bf16"] if device == "cuda" and torch.cuda.get_device_capability()[0] >= 8 else []
    losses = []
    for name in ("one", "two"):
        train(config(images, *settings), tmp_path / name)
        losses.append([line.get("loss") for line in read_metrics(tmp_path / name)])
    assert losses[0] == losses[1] and len(losses[0]) >= 10
