"""LARS on a GPU: under a GradScaler it skips an overflow, and the host does not look."""

import pytest
import torch

from caco_fast.optim import LARS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_an_overflow_is_skipped_without_a_look_by_the_host():
    device = torch.device("cuda")
    weight = torch.nn.Parameter(torch.randn(300, 200, device=device))
    optimizer, scaler = LARS([weight], 0.1), torch.amp.GradScaler("cuda")
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


def test_a_captured_step_reads_its_flag_and_lr_at_every_replay():
    device = torch.device("cuda")
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in ((64, 3, 7, 7), (512, 20), (5,), ())]
    for p in params:
        p.grad = torch.randn_like(p)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, twin in zip(params, twins):
        twin.grad = p.grad.clone()
    flag, lr = torch.zeros((), device=device), torch.full((), 0.1, device=device)
    captured, eager = LARS(params, lr), LARS(twins, 0.1)
    captured.found_inf = flag
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for set_to in (0.0, 1.0, 0.0):
        flag.fill_(set_to)
        graph.replay()
    for _ in range(3):
        eager.step()
    for found, expected in zip(params, twins):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
