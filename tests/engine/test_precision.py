"""What the encoders compute in where the settings leave it to the device."""

import builtins
import io

import pytest
import torch

from caco_fast.config import load_config
from caco_fast.engine.precision import settled_precision
from caco_fast.errors import UserError
from caco_fast.host import computes_in_bf16
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_a_gpu_without_bf16_computes_in_fp16(capability, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert settled_precision("auto", GPU) == wanted
    assert settled_precision("tf32", GPU) == "tf32"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("flags : fpu avx2 fma", "f32"),
        ("flags : avx512f avx512_vnni", "f32"),
        ("flags : avx512f avx512_bf16 amx_bf16", "bf16"),
        ("Features : asimd sve bf16 i8mm", "bf16"),
        (None, "f32"),
    ],
    ids=["AVX2", "AVX-512 without", "AVX-512 with", "ARM", "not told"],
)
def test_a_processor_without_bf16_computes_in_f32(flags, wanted, monkeypatch):
    def opened(path):
        assert path == "/proc/cpuinfo"
        if flags is None:
            raise FileNotFoundError(path)
        return io.StringIO(f"processor : 0\n{flags}\n")

    monkeypatch.setattr(builtins, "open", opened)
    found = settled_precision("auto", CPU)
    monkeypatch.undo()
    assert found == wanted


def test_a_run_records_what_it_ran_in_and_a_named_precision_is_not_changed(tmp_path):
    images = write_images(tmp_path / "images")
    run = config(images, "trainer.precision=auto", "trainer.max_steps=1", "evaluation.every_epochs=0")
    train(run, tmp_path / "run")
    recorded = load_config(tmp_path / "run" / "config.yaml").trainer.precision
    assert recorded == ("bf16" if computes_in_bf16() else "f32")
    with pytest.raises(UserError, match="bf17.*expected one of auto, f32"):
        train(config(images, "trainer.precision=bf17"), tmp_path / "other")
