"""ema_update_ and lars_step_ in plain torch: the two backends against the formula, what they refuse, torch.compile."""

import math
import re

import pytest
import torch
from torch import Tensor

from caco_fast.ops import cuda_optim, ema_update_, lars_step_, tensor_lists

SHAPES = ((4, 3), (2, 3, 3, 3), (5,), (), (0, 2), (3, 3))
SETTINGS = dict(lr=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)
backends = pytest.mark.parametrize("backend", ["reference", "foreach"])


def draw(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    return tensors


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def assert_same(left: list[Tensor], right: list[Tensor], atol: float = 0.0) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The EMA


@backends
@pytest.mark.parametrize("weight", [0.0, 0.01, 0.7, 1.0])
def test_ema_is_the_formula(backend, weight):
    averages, values = draw(), draw()
    wanted = [(1 - weight) * g + weight * f for g, f in zip(averages, values)]
    ema_update_(averages, values, weight, backend=backend)
    assert_same(averages, wanted, 1e-15)


@backends
def test_ema_reads_its_flag(backend):
    averages, values = draw(torch.float32), draw(torch.float32)
    before, wanted = copies(averages), copies(averages)
    ema_update_(averages, values, 0.3, skip=torch.tensor(1.0), backend=backend)
    assert_same(averages, before)
    ema_update_(averages, values, 0.3, skip=torch.tensor(0.0), backend=backend)
    ema_update_(wanted, values, 0.3, backend=backend)
    assert_same(averages, wanted, 5e-7)


# LARS; its formula over several steps is in tests/optim/test_lars.py


@backends
def test_lars_unscales_before_it_takes_norms(backend):
    params, grads, velocities = draw(), draw(), draw()
    wanted = copies(params), copies(velocities)
    lars_step_(wanted[0], grads, wanted[1], **SETTINGS, backend=backend)
    scaled = [1024 * g for g in grads]
    lars_step_(params, scaled, velocities, **SETTINGS, grad_scale=torch.tensor(1024.0), backend=backend)
    assert_same(params, wanted[0], 1e-14)
    assert_same(velocities, wanted[1], 1e-14)
    assert_same(scaled, [1024 * g for g in grads])


@backends
@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_lars_changes_nothing_where_its_flag_is_set(backend, value):
    params, grads, velocities = draw(), draw(), draw()
    for grad in grads:
        grad.fill_(value)
    before = copies(params), copies(velocities)
    lars_step_(params, grads, velocities, **SETTINGS, skip=torch.tensor(1.0), backend=backend)
    assert_same(params, before[0])
    assert_same(velocities, before[1])


@backends
def test_lars_steps_where_its_flag_is_not_set(backend):
    params, grads, velocities = draw(), draw(), draw()
    wanted = copies(params), copies(velocities)
    lars_step_(wanted[0], grads, wanted[1], **SETTINGS, backend=backend)
    lars_step_(params, grads, velocities, **SETTINGS, skip=torch.tensor(0.0), backend=backend)
    assert_same(params, wanted[0], 1e-7)  # lr and momentum have passed through f32
    assert_same(velocities, wanted[1], 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_foreach_agrees_with_the_reference(dtype):
    params, grads, velocities = draw(dtype), draw(dtype), draw(dtype)
    wanted = copies(params), copies(velocities)
    lars_step_(*wanted[:1], grads, wanted[1], **SETTINGS, backend="reference")
    lars_step_(params, grads, velocities, **SETTINGS)
    assert_same(params, wanted[0], 8 * torch.finfo(dtype).eps)
    assert_same(velocities, wanted[1], 8 * torch.finfo(dtype).eps)


@backends
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_a_rate_on_the_device_is_the_number(backend, skip):
    skip = None if skip is None else torch.tensor(skip)
    lists = draw(), draw(), draw()
    others = [copies(tensors) for tensors in lists]
    settings = SETTINGS | {"skip": skip, "backend": backend}
    lars_step_(*lists, **settings)
    lars_step_(*others, **settings | {"lr": torch.tensor(SETTINGS["lr"], dtype=torch.float64)})
    ema_update_(lists[2], lists[0], 0.3, skip=skip, backend=backend)
    ema_update_(others[2], others[0], torch.tensor(0.3, dtype=torch.float64), skip=skip, backend=backend)
    for found, wanted in zip(others, lists):
        assert_same(found, wanted, 1e-7)  # beside a flag, a number passes through f32


def test_empty_lists_are_no_work():
    ema_update_([], [], 0.5, backend="foreach")
    lars_step_([], [], [], **SETTINGS)


# What is refused

ONE = torch.ones(2)


@pytest.mark.parametrize(
    "call, error, line",
    [
        (lambda: ema_update_([ONE], [ONE, ONE], 0.5), ValueError, "values: found 2 tensors, wanted 1 as in averages"),
        (lambda: ema_update_([ONE], [ONE], 1.5), ValueError, "weight: found 1.5, wanted a number in [0, 1]"),
        (lambda: ema_update_([ONE], [ONE], 0.5, backend="gpu"), ValueError, "found backend 'gpu', wanted one of auto"),
        (lambda: ema_update_([ONE], [ONE], 0.5, skip=ONE), ValueError, "skip: found torch.float32 [2] on cpu, wanted"),
        (lambda: ema_update_([ONE], [ONE], 0.5, skip=True), TypeError, "skip: found bool, wanted a tensor"),
        (lambda: ema_update_([ONE], [ONE], ONE), ValueError, "weight: found torch.float32 [2] on cpu, wanted a number"),
        (lambda: lars_step_([ONE], [ONE], [ONE], **{**SETTINGS, "lr": ONE}), ValueError, "lr: found torch.float32 [2]"),
        (lambda: lars_step_([ONE], [ONE], [], **SETTINGS), ValueError, "velocities: found 0 tensors, wanted 1"),
        (lambda: lars_step_([ONE], [ONE], [ONE], **{**SETTINGS, "lr": -1}), ValueError, "lr: found -1, wanted 0"),
    ],
)
def test_a_bad_argument_is_named(call, error, line):
    with pytest.raises(error, match=re.escape(line)):
        call()


@pytest.mark.parametrize(
    "averages, values, error, line",
    [
        ([ONE.double()], [ONE], TypeError, "averages[0]: backend 'cuda': found torch.float64, wanted torch.float32"),
        ([ONE, ONE], [ONE, torch.ones(3)], ValueError, "values[1]: found shape [3], wanted [2] as averages[1]"),
        ([torch.ones(2, 4)[:, :2]], [torch.ones(2, 2)], ValueError, "found strides (4, 1) for shape [2, 2], wanted"),
        ([torch.ones(2, 3)], [torch.ones(3, 2).T], ValueError, "values[0]: backend 'cuda': found strides (1, 2), want"),
        ([ONE], [torch.ones(2, device="meta")], ValueError, "values[0]: found on meta, wanted on cpu as averages[0]"),
    ],
    ids=["dtype", "shape", "gaps", "order", "device"],
)
def test_what_the_kernels_cannot_walk_side_by_side_is_named(averages, values, error, line):
    with pytest.raises(error, match=re.escape(line)):
        tensor_lists.check_for_kernels("ema_update_", {"averages": averages, "values": values})


def test_strides_along_a_dimension_of_one_do_not_matter():
    left = torch.ones(4, 3, 1, 1)
    right = left.contiguous(memory_format=torch.channels_last)
    assert left.as_strided(left.shape, (3, 1, 9, 9)).stride() != right.stride()
    tensor_lists.check_for_kernels("op", {"a": [left.as_strided(left.shape, (3, 1, 9, 9))], "b": [right]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_named_backend_that_is_not_there_is_never_replaced():
    with pytest.raises(RuntimeError, match="ema_update_: backend='cuda'.*backend='auto'"):
        ema_update_([ONE.clone()], [ONE], 0.5, backend="cuda")


# The kernels' operations, as torch sees them; what the kernels do is in tests/csrc


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(tensor_lists, "resolve", lambda op, backend, device: "cuda")
    from caco_fast.ops import ema_update, lars_step

    monkeypatch.setattr(cuda_optim, "ema_update_", ema_update.ema_update_reference_)
    monkeypatch.setattr(cuda_optim, "lars_step_", lars_step.lars_step_reference_)
    torch._dynamo.reset()


def test_opcheck(stand_ins):
    lists = [draw(torch.float32) for _ in range(3)]
    flag, rate = torch.tensor(0.0), torch.tensor(0.3)
    torch.library.opcheck(torch.ops.caco_fast.ema_update_, (lists[0], lists[1], rate, flag))
    torch.library.opcheck(torch.ops.caco_fast.lars_step_, (*lists, rate, 0.9, 0.01, 0.1, flag + 1, None))


def test_in_a_compiled_function_without_a_graph_break(stand_ins):
    def work(averages: list[Tensor], values: list[Tensor], velocities: list[Tensor]) -> Tensor:
        ema_update_(averages, values, 0.3, backend="cuda")
        lars_step_(averages, values, velocities, **SETTINGS, backend="cuda")
        return averages[0].sum()

    lists = [draw(torch.float32) for _ in range(3)]
    others = [copies(tensors) for tensors in lists]
    found = torch.compile(work, fullgraph=True, backend="aot_eager")(*lists)
    torch.testing.assert_close(found, work(*others))
    for left, right in zip(lists, others):
        assert_same(left, right)


def test_a_write_by_the_kernels_is_seen_by_autograd(stand_ins):
    weight = torch.ones(2, 2, requires_grad=True)
    loss = (weight * weight).sum()
    ema_update_([weight], [torch.zeros(2, 2)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
