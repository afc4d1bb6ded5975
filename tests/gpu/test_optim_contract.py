"""What callers of EMA and LARS rely on on a GPU: same bits, graphs, gradients that move, no waiting, GradScaler."""

import pytest
import torch
from torch import Tensor

from caco_fast.ops import ema_update_, lars_step_
from caco_fast.optim import LARS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

SHAPES = ((64, 3, 7, 7), (512, 2048), (2048,), (1000, 33), (), (5,))
SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, trust=0.02)
LONG_SLEEP = 50_000_000  # cycles; some 30 ms, far longer than launching a step takes


class Step:
    """Parameters, gradients, velocities and a key encoder's parameters; each list as those of an encoder."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params, self.grads, self.velocities, self.keys = (
            [torch.randn(shape, generator=generator).to(device) for shape in SHAPES] for _ in range(4)
        )

    def copy(self) -> "Step":
        other = object.__new__(Step)
        other.__dict__.update({name: [t.clone() for t in tensors] for name, tensors in self.__dict__.items()})
        return other

    def __call__(self, backend: str = "cuda", skip: Tensor | None = None) -> list[Tensor]:
        lars_step_(self.params, self.grads, self.velocities, **SETTINGS, skip=skip, backend=backend)
        ema_update_(self.keys, self.params, 0.01, skip=skip, backend=backend)
        return self.params + self.velocities + self.keys


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_ten_launches_give_the_same_bits(device):
    start = Step(device)
    expected = start.copy()()
    side, load = torch.cuda.Stream(device), torch.randn(2048, 2048, device=device)
    side.wait_stream(torch.cuda.current_stream(device))
    for _ in range(10):
        with torch.cuda.stream(side):  # blocks of the kernels come and go in another order
            for _ in range(5):
                load = torch.tanh(load + 1)
        assert same(start.copy()(), expected)


def test_kernels_agree_with_foreach_over_steps(device):
    kernels, foreach = Step(device), Step(device)
    for _ in range(5):
        for found, expected in zip(kernels("cuda"), foreach("foreach"), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_may_move_between_steps_that_nothing_waits_for(device):
    """The table is written anew while the step before still runs from the old one."""
    moved, still = Step(device), Step(device)
    moved.copy()()  # the first launch loads the kernels
    places = [[grad.clone() for grad in moved.grads] for _ in range(3)]
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(LONG_SLEEP)
        for grads in places:
            moved.grads = grads
            found = moved()
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the calls returned after the work had ended"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in places:
        expected = still()
    assert same(found, expected)


def test_a_captured_graph_replays_steps_of_the_same_bits(device):
    start = Step(device)
    eager, captured = start.copy(), start.copy()
    flag = torch.zeros((), device=device)
    for _ in range(3):
        expected = [tensor.clone() for tensor in eager()]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        captured.copy()(skip=flag)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured(skip=flag)
    assert same(captured.params, start.params), "capturing must not run anything"
    for set_to in (0.0, 1.0, 0.0, 1.0, 0.0):  # the flag is read at every replay
        flag.fill_(set_to)
        torch.full((2**20,), torch.nan, device=device)  # memory of a table that was freed would be overwritten
        graph.replay()
    assert same(results, expected)


@pytest.mark.parametrize("backend", ["foreach", "cuda"])
def test_an_overflow_is_skipped_without_a_look_by_the_host(device, backend):
    weight = torch.nn.Parameter(torch.randn(300, 200, device=device))
    optimizer, scaler = LARS([weight], 0.1, backend=backend), torch.amp.GradScaler("cuda")
    start = weight.detach().clone()
    for factor, moves in ((torch.inf, False), (1.0, True)):
        factor = torch.tensor(factor, device=device)
        optimizer.zero_grad()
        scaler.scale((weight.square() * factor).sum()).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(weight, start) != moves
        assert weight.isfinite().all()
