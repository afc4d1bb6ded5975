"""lars_step_: both backends against the formula, its launches, flag and rate on the device, what it refuses.

Its formula over several steps of the optimiser is in tests/optim/test_lars.py.
"""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from caco_fast.models import BackboneConfig, ProjectorConfig, build_encoder_pair
from caco_fast.ops import lars_step_
from tests.ops.tensors import assert_same, copies, draw

ONE = torch.ones(2)
SETTINGS = dict(lr=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)
backends = pytest.mark.parametrize("backend", ["reference", "foreach"])


def lists(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients and velocities; one matrix is zero, and another's gradient."""
    params, grads, velocities = draw(dtype), draw(dtype), draw(dtype)
    params[0].zero_()
    grads[5].zero_()
    return params, grads, velocities


def by_hand(
    params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], scale: float = 1.0, inside: bool = False
):
    """New parameters and velocities, tensor by tensor in f64."""
    stepped = []
    for w, g, v in zip(params, grads, velocities, strict=True):
        w, d, v = w.double(), g.double() / scale, v.double()
        if w.ndim > 1:
            d = d + SETTINGS["weight_decay"] * w
            weight_norm, norm = math.sqrt(w.square().sum()), math.sqrt(d.square().sum())
            if weight_norm > 0 and norm > 0:
                d = SETTINGS["trust"] * weight_norm / norm * d
        of_gradient, of_velocity = (SETTINGS["lr"], 1.0) if inside else (1.0, SETTINGS["lr"])
        v = SETTINGS["momentum"] * v + of_gradient * d
        stepped.append((w - of_velocity * v, v))
    return [list(tensors) for tensors in zip(*stepped)]


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["", "lr in velocity"])
def test_the_formula(backend, dtype, scale, flagged, inside):
    """Several steps; a gradient stays as it was, and the norms are those of unscaled gradients."""
    params, grads, velocities = lists(dtype)
    flags = dict(skip=torch.tensor(0.0)) if flagged else {}
    if scale is not None:
        flags["grad_scale"] = torch.tensor(scale)
        grads = [scale * g for g in grads]
    for _ in range(3):
        expected, kept = by_hand(params, grads, velocities, scale or 1.0, inside), copies(grads)
        lars_step_(params, grads, velocities, **SETTINGS, **flags, lr_in_velocity=inside, backend=backend)
        atol = 1e-6 if dtype == torch.float32 else 1e-14
        assert_same([w.double() for w in params], expected[0], atol)
        assert_same([v.double() for v in velocities], expected[1], atol)
        assert_same(grads, kept)
        grads = [g.neg() for g in grads]


@backends
@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("flag", [1.0, 3.0])
def test_a_flag_that_is_set_changes_nothing(backend, value, flag):
    params, grads, velocities = lists()
    for grad in grads:
        grad.fill_(value)
    before = copies(params), copies(velocities)
    lars_step_(params, grads, velocities, **SETTINGS, skip=torch.tensor(flag), backend=backend)
    assert_same(params, before[0])
    assert_same(velocities, before[1])


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_a_flag_is_read_for_every_layout(flag):
    """A gradient in another memory format than its parameter, and a parameter with gaps."""
    params, grads, velocities = lists()
    grads[1] = grads[1].contiguous()
    params.append(torch.randn(6, 8, dtype=torch.float64)[:, ::2])
    grads.append(torch.randn(6, 4, dtype=torch.float64))
    velocities.append(torch.zeros(4, 6, dtype=torch.float64).T)
    expected = by_hand(params, grads, velocities) if flag == 0 else (copies(params), copies(velocities))
    lars_step_(params, grads, velocities, **SETTINGS, skip=torch.tensor(flag))
    assert_same(params, expected[0], 1e-14)
    assert_same(velocities, expected[1], 1e-14)


@backends
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
@pytest.mark.parametrize("inside", [False, True], ids=["", "lr in velocity"])
def test_an_lr_on_the_device_is_the_number(backend, skip, inside):
    skip = None if skip is None else torch.tensor(skip)
    params, grads, velocities = lists()
    others = copies(params), copies(velocities)
    settings: dict[str, Any] = SETTINGS | {"skip": skip, "backend": backend, "lr_in_velocity": inside}
    lars_step_(params, grads, velocities, **settings)
    lars_step_(others[0], grads, others[1], **settings | {"lr": torch.tensor(0.3, dtype=torch.float64)})
    assert_same(others[0], params, 1e-7)  # next to a flag, a number passes through f32
    assert_same(others[1], velocities, 1e-7)


def test_tensors_of_one_dimension_alone():
    params, grads, velocities = ([tensor.flatten() for tensor in tensors] for tensors in lists())
    expected = by_hand(params, grads, velocities)
    lars_step_(params, grads, velocities, **SETTINGS)
    assert_same(params, expected[0], 1e-14)


def test_empty_lists_are_no_work():
    lars_step_([], [], [], **SETTINGS)


class Launches(TorchDispatchMode):
    """Operations that launch work; one on a list of 0-d tensors counts for each of them, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            scalars = func is torch.ops.aten._foreach_mul_.List and all(scalar.ndim == 0 for scalar in args[1])
            self.count += len(args[1]) if scalars else 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def resnet50() -> list[Tensor]:
    pair = build_encoder_pair(BackboneConfig(name="resnet50"), ProjectorConfig(), 3)
    return [p.detach() for p in pair.query.parameters()]


@pytest.mark.parametrize("skip", [None, 0.0])
@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_resnet50_takes_fewer_than_80_launches(resnet50, lr, scale, skip):
    assert sum(p.ndim > 1 for p in resnet50) == 56
    flags = {name: torch.tensor(value) for name, value in (("skip", skip), ("grad_scale", scale)) if value is not None}
    grads, velocities = ([torch.zeros_like(p) for p in resnet50] for _ in range(2))
    with Launches() as launches:
        lars_step_(resnet50, grads, velocities, **SETTINGS | {"lr": lr}, **flags)
    assert 56 < launches.count < 80


@pytest.mark.parametrize(
    "call, error, line",
    [
        (lambda: lars_step_([ONE], [ONE], [ONE], **{**SETTINGS, "lr": ONE}), ValueError, "lr: found torch.float32 [2]"),
        (lambda: lars_step_([ONE], [ONE], [], **SETTINGS), ValueError, "velocities: found 0 tensors, expected 1"),
        (lambda: lars_step_([ONE], [ONE], [ONE], **{**SETTINGS, "lr": -1}), ValueError, "lr: found -1, expected 0"),
    ],
)
def test_a_bad_argument_is_named(call, error, line):
    with pytest.raises(error, match=re.escape(line)):
        call()


def test_a_compiled_function_needs_no_graph_break():
    torch._dynamo.reset()
    params, grads, velocities = lists(torch.float32)
    others = copies(params), copies(velocities)
    torch.compile(lars_step_, fullgraph=True, backend="aot_eager")(params, grads, velocities, **SETTINGS)
    lars_step_(others[0], grads, others[1], **SETTINGS)
    assert_same(params, others[0], 1e-6)
