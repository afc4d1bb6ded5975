"""ema_update_: both backends against the formula, its flag and rate on the device, what it refuses, torch.compile."""

import re

import pytest
import torch

from caco_fast.ops import ema_update_
from tests.ops.tensors import assert_same, copies, draw

ONE = torch.ones(2)
backends = pytest.mark.parametrize("backend", ["reference", "foreach"])


@backends
@pytest.mark.parametrize("weight", [0.0, 0.01, 0.7, 1.0])
def test_the_formula(backend, weight):
    averages, values = draw(), draw()
    expected = [(1 - weight) * g + weight * f for g, f in zip(averages, values)]
    kept = copies(values)
    ema_update_(averages, values, weight, backend=backend)
    assert_same(averages, expected, 1e-15)
    assert_same(values, kept)


@backends
def test_it_reads_its_flag(backend):
    averages, values = draw(torch.float32), draw(torch.float32)
    before, expected = copies(averages), copies(averages)
    ema_update_(averages, values, 0.3, skip=torch.tensor(1.0), backend=backend)
    assert_same(averages, before)
    ema_update_(averages, values, 0.3, skip=torch.tensor(0.0), backend=backend)
    ema_update_(expected, values, 0.3, backend=backend)
    assert_same(averages, expected, 5e-7)


@backends
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_a_weight_on_the_device_is_the_number(backend, skip):
    skip = None if skip is None else torch.tensor(skip)
    averages, values = draw(), draw()
    others = copies(averages)
    ema_update_(averages, values, 0.3, skip=skip, backend=backend)
    ema_update_(others, values, torch.tensor(0.3, dtype=torch.float64), skip=skip, backend=backend)
    assert_same(others, averages, 1e-7)  # next to a flag, a number passes through f32


def test_empty_lists_are_no_work():
    ema_update_([], [], 0.5, backend="foreach")


def test_a_compiled_function_needs_no_graph_break():
    torch._dynamo.reset()
    averages, values = draw(torch.float32), draw(torch.float32)
    others = copies(averages)
    torch.compile(ema_update_, fullgraph=True, backend="aot_eager")(averages, values, 0.3)
    ema_update_(others, values, 0.3)
    assert_same(averages, others, 5e-7)  # a compiler decomposes lerp, with other roundings


@pytest.mark.parametrize(
    "call, error, line",
    [
        (lambda: ema_update_([ONE], [ONE, ONE], 0.5), ValueError, "values: found 2 tensors, expected 1 as in averages"),
        (lambda: ema_update_([ONE], [ONE], 1.5), ValueError, "weight: found 1.5, expected a number in [0, 1]"),
        (
            lambda: ema_update_([ONE], [ONE], 0.5, backend="gpu"),
            ValueError,
            "backend: found 'gpu', expected one of auto",
        ),
        (
            lambda: ema_update_([ONE], [ONE], 0.5, skip=ONE),
            ValueError,
            "skip: found torch.float32 [2] on cpu, expected",
        ),
        (lambda: ema_update_([ONE], [ONE], 0.5, skip=True), TypeError, "skip: found bool, expected a tensor"),
        (
            lambda: ema_update_([ONE], [ONE], ONE),
            ValueError,
            "weight: found torch.float32 [2] on cpu, expected a number",
        ),
    ],
)
def test_a_bad_argument_is_named(call, error, line):
    with pytest.raises(error, match=re.escape(line)):
        call()


def test_a_write_is_seen_by_autograd():
    weight = torch.ones(2, 2, requires_grad=True)
    loss = (weight * weight).sum()
    ema_update_([weight], [torch.zeros(2, 2)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
