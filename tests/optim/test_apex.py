"""NVIDIA Apex by stand-ins on the import path: it is recognised by what it holds, and named where it is asked for."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from caco_fast.apex import BUILD
from caco_fast.errors import UserError
from caco_fast.optim import OptimizerConfig, build_optimizer

REAL = """
from torch.optim import SGD
class FusedSGD(SGD):
    pass
"""


def install(folder: Path, kind: str) -> None:
    """`kind`: "theirs" for the package index's project, "plain" for Apex without extensions, "real" with them."""
    package = folder / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('pyramid')" if kind == "theirs" else "")
    if kind != "theirs":
        (package / "optimizers").mkdir()
        (package / "optimizers" / "__init__.py").write_text("from apex.optimizers.fused_sgd import FusedSGD")
        (package / "optimizers" / "fused_sgd.py").write_text(REAL)
    if kind == "real":
        (folder / "amp_C.py").write_text("")


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[nn.Parameter]:
    class OnGpu(nn.Parameter):
        is_cuda = True

    return [OnGpu(torch.ones(3))]


def build(asked: str, params: list[nn.Parameter], name: str = "sgd") -> torch.optim.Optimizer:
    config = OptimizerConfig(name=name, lr=0.1, momentum=0.8, weight_decay=0.01, apex=asked)
    return build_optimizer(config, iter(params), batch_size=512)


def test_default_is_torchs_own(on_path: Path, as_on_a_gpu: list[nn.Parameter]) -> None:
    install(on_path, "real")
    assert OptimizerConfig().apex == "off"
    assert type(build("off", as_on_a_gpu)) is SGD


@pytest.mark.parametrize("asked", ["on", "auto"])
def test_the_real_one_gets_the_settings(asked: str, on_path: Path, as_on_a_gpu: list[nn.Parameter]) -> None:
    install(on_path, "real")
    optimizer = build(asked, as_on_a_gpu)
    assert type(optimizer).__module__ == "apex.optimizers.fused_sgd"
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.8, 0.01)
    assert group["params"] == as_on_a_gpu


@pytest.mark.parametrize(
    "kind, line",
    [
        ("none", "NVIDIA Apex is not installed"),
        ("theirs", "the installed package 'apex' is not NVIDIA's, it has no optimizers/fused_sgd.py; uninstall it"),
        ("plain", "NVIDIA Apex is installed without its extension amp_C"),
    ],
)
def test_without_it_on_is_an_error_and_auto_is_torchs(
    kind: str, line: str, on_path: Path, as_on_a_gpu: list[nn.Parameter]
) -> None:
    if kind != "none":
        install(on_path, kind)
    assert type(build("auto", as_on_a_gpu)) is SGD
    with pytest.raises(UserError) as error:
        build("on", as_on_a_gpu)
    assert str(error.value) == f"optimizer.apex: {line}; build it by `{BUILD}`, or set optimizer.apex=off"


def test_it_needs_a_gpu(on_path: Path) -> None:
    install(on_path, "real")
    assert type(build("auto", [nn.Parameter(torch.ones(3))])) is SGD
    with pytest.raises(UserError, match="optimizer.apex: FusedSGD needs parameters on a GPU"):
        build("on", [nn.Parameter(torch.ones(3))])


def test_it_serves_sgd_alone(as_on_a_gpu: list[nn.Parameter]) -> None:
    with pytest.raises(UserError, match="optimizer.apex: Apex serves sgd here, not lars"):
        build("on", as_on_a_gpu, name="lars")


@pytest.mark.parametrize("given, read", [("True", "on"), ("false", "off"), ("auto", "auto")])
def test_yamls_truth_values_are_on_and_off(given: str, read: str) -> None:
    assert OptimizerConfig(name="sgd", apex=given).apex == read


def test_another_value_is_refused() -> None:
    with pytest.raises(UserError, match="optimizer.apex: found 'yes please', expected auto, on or off"):
        OptimizerConfig(apex="yes please")
