"""BatchNorm over several gloo ranks against BatchNorm of the whole batch in one process, in f64.

Legend: n ranks.
"""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from caco_fast.distributed import rank
from caco_fast.errors import UserError
from caco_fast.models import synchronise_batch_norm
from caco_fast.models.batch_norm import SyncedBatchNorm

CHANNELS = 3
EXACT = dict(rtol=0, atol=1e-12)
CPU = torch.device("cpu")
# Rank r brings r + 2 rows: the statistics weigh values, not ranks.
SHAPES = {"rows": (CHANNELS,), "maps": (CHANNELS, 4, 5)}


def make(kind: str) -> nn.Module:
    torch.manual_seed(1)
    layer = (nn.BatchNorm1d if kind == "rows" else nn.BatchNorm2d)(CHANNELS, momentum=0.3).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def whole_batch(kind: str, ranks: int) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs with a large mean, and the gradients of the outputs, of every rank."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(r + 2, *SHAPES[kind]) for r in range(ranks)]
    draw = [torch.randn(2, *shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [100 + (r + 1) * d[0] for r, d in enumerate(draw)], [d[1] for d in draw]


def passes(layer: nn.Module, inputs: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Two training steps, so that the running statistics are more than the first batch; then one in evaluation mode."""
    for scale in (1.0, 2.0):
        layer.zero_grad()
        x = (scale * inputs).requires_grad_()
        output = layer(x)
        output.backward(grad)
    layer.eval()
    return {
        "output": output.detach(),
        "input gradient": x.grad,
        "weight gradient": layer.weight.grad,
        "bias gradient": layer.bias.grad,
        "evaluation": layer(inputs).detach(),
        **layer.state_dict(),
    }


def on_rank(ranks: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for kind in SHAPES:
        layer = synchronise_batch_norm(make(kind), CPU)
        assert isinstance(layer, SyncedBatchNorm)
        inputs, grads = whole_batch(kind, ranks)
        found[kind] = passes(layer, inputs[rank()], grads[rank()])
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_what_one_process_does_with_the_whole_batch(ranks: int) -> None:
    results = run_ranks(on_rank, ranks, ranks)
    for kind in SHAPES:
        inputs, grads = whole_batch(kind, ranks)
        wanted = passes(make(kind), torch.cat(inputs), torch.cat(grads))
        for name in ("output", "input gradient", "evaluation"):
            together = torch.cat([found[kind][name] for found in results])
            torch.testing.assert_close(together, wanted[name], **EXACT, msg=lambda m, n=f"{kind} {name}": f"{n}: {m}")
        for name in ("weight gradient", "bias gradient"):
            torch.testing.assert_close(sum(found[kind][name] for found in results), wanted[name], **EXACT)
        for found in results:
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(found[kind][name], wanted[name], rtol=1e-12, atol=0)
            assert found[kind]["num_batches_tracked"] == 2


def test_one_process_needs_no_process_group() -> None:
    inputs, grads = whole_batch("maps", 1)
    found = passes(synchronise_batch_norm(make("maps"), CPU), inputs[0], grads[0])
    wanted = passes(make("maps"), inputs[0], grads[0])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def test_conversion_keeps_values_keys_dtype_mode_and_frozen_parameters() -> None:
    inner = nn.Sequential(nn.Conv2d(1, CHANNELS, 1).double(), make("maps"), nn.ReLU())
    inner[1].running_mean.fill_(0.5)
    inner[1].weight.requires_grad_(False)
    inner[1].eval()
    before = {key: value.clone() for key, value in inner.state_dict().items()}
    synced = synchronise_batch_norm(inner, CPU)
    assert isinstance(synced[1], SyncedBatchNorm) and not synced[1].training
    assert (synced[1].eps, synced[1].momentum) == (1e-5, 0.3)
    assert not synced[1].weight.requires_grad and synced[1].bias.requires_grad
    after = synced.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert torch.equal(after[key], value) and after[key].dtype == value.dtype, key
    assert synchronise_batch_norm(synced, CPU)[1] is synced[1]


def test_bf16_activations_have_f32_statistics() -> None:
    layer = synchronise_batch_norm(nn.BatchNorm1d(CHANNELS), CPU)
    x = (100 + torch.randn(64, CHANNELS)).bfloat16().requires_grad_()
    output = layer(x)
    output.sum().backward()
    assert output.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(layer.running_mean, 0.1 * x.detach().float().mean(dim=0))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm3d(2), nn.BatchNorm2d(2, affine=False), nn.BatchNorm1d(2, track_running_stats=False)],
    ids=["BatchNorm3d", "no affine", "no running statistics"],
)
def test_what_it_can_not_do_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UserError, match="has no statistics over several CPU ranks; use one rank, GPUs, or a ResNet"):
        synchronise_batch_norm(nn.Sequential(layer), CPU)
