"""torch.compile of encoders and loss: one graph each, the same values, on one rank and on several.

The graphs run uncompiled (backend aot_eager): what inductor makes of them is recorded by tools/check/switches.py.
"""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from caco_fast.distributed import rank, world_size
from caco_fast.engine import compiling
from caco_fast.engine.compiling import compile_step
from caco_fast.engine.step import Rates
from caco_fast.errors import UserError
from caco_fast.methods import CaCoConfig, MoCoConfig, build_method
from caco_fast.models import (
    BackboneConfig,
    Encoder,
    EncoderPair,
    ProjectorConfig,
    build_encoder_pair,
    build_projector,
    segment_batch_norm,
)
from tests.methods.stand_ins import sgd_step
from tests.ranks import run_ranks

CPU = torch.device("cpu")
B, C = 6, 4


def small_pair(joint_views: bool) -> EncoderPair:
    """A convolution and a projector, each with a BatchNorm: a graph takes a second."""
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    backbone = nn.Sequential(*layers)
    parts = segment_batch_norm(backbone), segment_batch_norm(build_projector(ProjectorConfig(2, 8, C), 4))
    return EncoderPair(Encoder(*parts, torch.bfloat16, joint_views))


def resnet_pair(joint_views: bool) -> EncoderPair:
    backbone = BackboneConfig("resnet18", "small_stride2", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]})
    return build_encoder_pair(backbone, ProjectorConfig(2, 8, C), 1, torch.bfloat16, joint_views)


def steps(
    compiled: bool, name: str = "caco", joint_views: bool = True, make: Callable[[bool], EncoderPair] = small_pair
) -> dict[str, Tensor]:
    """Losses and state after three steps on two large views, and for CaCo two small ones."""
    torch.manual_seed(0)
    pair = make(joint_views)
    settings = {"caco": CaCoConfig(bank_size=13), "moco": MoCoConfig(queue_size=13, symmetric=True)}[name]
    method = build_method(name, C, {name: settings})
    if compiled:
        compile_step(pair, method, CPU, backend="aot_eager", fullgraph=True)
    step = sgd_step(method, pair)
    step.enter(method.phases(B)[-1])
    losses = []
    for _ in range(3):
        # No smaller: where a 3x3 convolution of stride 2 gets a map of 1x1, oneDNN's bf16 backward pass (torch 2.11, on
        # a processor with AMX) reads memory that nothing wrote.
        sides = (16, 16, 12, 12) if name == "caco" else (16, 16)
        views = [torch.randn(B, 1, side, side).chunk(world_size())[rank()] for side in sides]
        step.interval.clear()
        step(views, Rates(0.1, 0.99, 1.0))
        losses.append(step.interval.sums["loss"].clone())
    return {"losses": torch.stack(losses), **pair.state_dict(), **method.state_dict()}


def both() -> list[dict[str, Tensor]]:
    return [steps(compiled) for compiled in (False, True)]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


CASES = {
    "caco, views together, resnet": ("caco", True, resnet_pair),
    "caco, views apart": ("caco", False, small_pair),
    "moco, views together": ("moco", True, small_pair),
}


@pytest.mark.parametrize("case", CASES)
def test_one_rank_in_one_graph(case: str) -> None:
    torch._dynamo.reset()
    assert_same(steps(True, *CASES[case]), steps(False, *CASES[case]))


def test_batch_norm_over_two_ranks_in_one_graph() -> None:
    for eager, compiled in run_ranks(both, 2):
        assert_same(compiled, eager)


@pytest.mark.parametrize(
    "device, line", [("cpu", "needs a C\\+\\+ compiler, found no g\\+\\+"), ("cuda", "needs triton")]
)
def test_a_missing_compiler_is_named(device: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling.shutil, "which", lambda program: None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=line):
        compile_step(None, None, torch.device(device))
