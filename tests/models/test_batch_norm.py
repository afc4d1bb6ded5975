"""BatchNorm of several views in one batch, over several gloo ranks, against torch's BatchNorm on separate forwards of
the whole batch in one process, in f64.

Legend: S segments (views), n ranks, C channels.
"""

from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from caco_fast.distributed import count_traffic, rank
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig, ProjectorConfig, build_encoder_pair, segment_batch_norm
from caco_fast.models.batch_norm import (
    SegmentedBatchNorm,
    SegmentedBatchNormAct,
    require_statistics_of_all_ranks,
    segmented,
    separable,
)
from tests.ranks import run_ranks

CHANNELS = 3
EXACT = dict(rtol=0, atol=1e-12)
MAPS = (CHANNELS, 4, 5)
SHAPES = {"rows": (CHANNELS,), "maps": MAPS, "maps, channels last": MAPS, "act": MAPS}
LAYERS: dict[str, Callable[..., nn.Module]] = {"rows": nn.BatchNorm1d, "act": BatchNormAct2d}
SEGMENTS = (1, 2, 3)


def make(kind: str) -> nn.Module:
    torch.manual_seed(1)
    layer = LAYERS.get(kind, nn.BatchNorm2d)(CHANNELS, momentum=0.3).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def draw(kind: str, segments: int, ranks: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Inputs with a large mean, and gradients of the outputs, by rank and segment. Rank r brings r + 2 rows a segment:
    the statistics weigh values, not ranks."""
    generator = torch.Generator().manual_seed(2)
    layout = torch.channels_last if "last" in kind else torch.contiguous_format
    inputs, grads = [], []
    for r in range(ranks):
        shape = (segments, r + 2, *SHAPES[kind])
        noise, grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
        # Segments of other means and widths than the whole batch.
        inputs.append([(100 * (s + 1) + (r + 1) * (s + 2) * noise[s]).contiguous(memory_format=layout)
                       for s in range(segments)])  # fmt: skip
        grads.append(list(grad))
    return inputs, grads


def together(layer: nn.Module, inputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Two training steps, so that the running statistics are more than the first batch; then one in evaluation mode."""
    for scale in (1.0, 2.0):
        layer.zero_grad()
        x = (scale * torch.cat(inputs)).requires_grad_()
        with segmented(layer, len(inputs)):
            output = layer(x)
        output.backward(torch.cat(grads))
    layer.eval()
    return {
        "output": output.detach(),
        "input gradient": x.grad,
        "weight gradient": layer.weight.grad,
        "bias gradient": layer.bias.grad,
        "evaluation": layer(torch.cat(inputs)).detach(),
        **layer.state_dict(),
    }


def apart(layer: nn.Module, inputs: list[Tensor], grads: list[Tensor]) -> dict[str, list[Tensor] | Tensor]:
    """The same, each segment a forward of its own."""
    for scale in (1.0, 2.0):
        layer.zero_grad()
        xs = [(scale * x).requires_grad_() for x in inputs]
        outputs = [layer(x) for x in xs]
        torch.autograd.backward(outputs, grads)
    layer.eval()
    return {
        "output": [output.detach() for output in outputs],
        "input gradient": [x.grad for x in xs],
        "weight gradient": layer.weight.grad,
        "bias gradient": layer.bias.grad,
        "evaluation": [layer(x).detach() for x in inputs],
        **layer.state_dict(),
    }


def on_rank(ranks: int) -> dict[tuple[str, int], dict[str, Tensor]]:
    found = {}
    for kind in SHAPES:
        for segments in SEGMENTS:
            inputs, grads = draw(kind, segments, ranks)
            layer = segment_batch_norm(make(kind))
            found[kind, segments] = together(layer, inputs[rank()], grads[rank()])
    return found


def assert_agree(found: list[dict[str, Tensor]], kind: str, segments: int) -> None:
    """`found` by rank, against separate forwards of what all ranks hold."""
    ranks = len(found)
    inputs, grads = draw(kind, segments, ranks)
    wanted = apart(
        make(kind),
        [torch.cat([inputs[r][s] for r in range(ranks)]) for s in range(segments)],
        [torch.cat([grads[r][s] for r in range(ranks)]) for s in range(segments)],
    )
    for name in ("output", "input gradient", "evaluation"):
        for s in range(segments):
            parts = torch.cat([of_rank[name].chunk(segments)[s] for of_rank in found])
            torch.testing.assert_close(parts, wanted[name][s], **EXACT, msg=lambda m, n=f"{kind} {name}": f"{n}: {m}")
    for name in ("weight gradient", "bias gradient"):
        # A gradient of the weights sums over values of size 100.
        torch.testing.assert_close(sum(of_rank[name] for of_rank in found), wanted[name], rtol=1e-12, atol=1e-11)
    for of_rank in found:
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(of_rank[name], wanted[name], rtol=1e-12, atol=0)
        assert of_rank["num_batches_tracked"] == wanted["num_batches_tracked"] == 2 * segments


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_what_separate_forwards_of_the_whole_batch_do(ranks: int) -> None:
    results = run_ranks(on_rank, ranks, ranks)
    for kind in SHAPES:
        for segments in SEGMENTS:
            assert_agree([found[kind, segments] for found in results], kind, segments)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("kind", SHAPES)
def test_one_process_needs_no_process_group(kind: str, segments: int) -> None:
    inputs, grads = draw(kind, segments, 1)
    assert_agree([together(segment_batch_norm(make(kind)), inputs[0], grads[0])], kind, segments)


def collectives_of_a_step(joint_views: bool) -> tuple[int, int, list[Tensor]]:
    """Layers with BatchNorm, collectives of a step of queries, backward and keys, and its embeddings."""
    torch.manual_seed(0)
    backbone = BackboneConfig("resnet18", "small", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]})
    pair = build_encoder_pair(backbone, ProjectorConfig(hidden=8, dim=4), 1, joint_views=joint_views)
    views = [torch.randn(4, 1, 8, 8) for _ in range(2)]
    with count_traffic() as traffic:
        queries, keys = pair.queries(views), pair.keys(views)
        torch.cat(queries).sum().backward()
    layers = sum(isinstance(module, SegmentedBatchNorm) for module in pair.query.modules())
    return layers, sum(traffic.calls.values()), [embedding.detach() for embedding in (*queries, *keys)]


def both_ways() -> list[tuple[int, int, list[Tensor]]]:
    return [collectives_of_a_step(joint_views) for joint_views in (False, True)]


def test_views_together_halve_the_collectives() -> None:
    """Four separate forwards take six a layer and step, 330 for the 55 layers of CaCo's encoder."""
    separate, joint = run_ranks(both_ways, 2)[0]
    layers = separate[0]
    assert separate[1] == 6 * layers and joint[1] == 3 * layers
    for one, other in zip(separate[2], joint[2]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_resnet50_with_cacos_projector_has_55_batch_norms() -> None:
    with torch.device("meta"):
        pair = build_encoder_pair(BackboneConfig(), ProjectorConfig(), channels=3)
    assert sum(isinstance(module, SegmentedBatchNorm) for module in pair.query.modules()) == 55
    assert separable(pair)


def test_conversion_keeps_values_keys_dtype_mode_and_frozen_parameters() -> None:
    inner = nn.Sequential(nn.Conv2d(1, CHANNELS, 1).double(), make("maps"), nn.ReLU())
    inner[1].running_mean.fill_(0.5)
    inner[1].weight.requires_grad_(False)
    inner[1].eval()
    before = {key: value.clone() for key, value in inner.state_dict().items()}
    segmented_ = segment_batch_norm(inner)
    assert isinstance(segmented_[1], SegmentedBatchNorm) and not segmented_[1].training
    assert (segmented_[1].eps, segmented_[1].momentum) == (1e-5, 0.3)
    assert not segmented_[1].weight.requires_grad and segmented_[1].bias.requires_grad
    after = segmented_.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert torch.equal(after[key], value) and after[key].dtype == value.dtype, key
    assert segment_batch_norm(segmented_)[1] is segmented_[1]


def test_timms_batch_norm_keeps_its_activation() -> None:
    layer = BatchNormAct2d(CHANNELS, act_layer=nn.PReLU, act_kwargs={"init": 0.5})
    images = torch.randn(4, CHANNELS, 2, 2)
    wanted = layer(images)
    layer.reset_running_stats()
    converted = segment_batch_norm(layer)
    assert isinstance(converted, SegmentedBatchNormAct)
    torch.testing.assert_close(converted(images), wanted, rtol=0, atol=0)
    assert wanted.min() < 0


def on_rank_in_bf16() -> dict[str, Tensor]:
    torch.manual_seed(rank())
    layer = segment_batch_norm(nn.BatchNorm1d(CHANNELS))
    x = (100 + torch.randn(2, 64, CHANNELS)).bfloat16()
    flat = x.flatten(0, 1).requires_grad_()
    with segmented(layer, 2):
        output = layer(flat)
    output.square().sum().backward()
    assert output.dtype == flat.grad.dtype == torch.bfloat16
    return {"input": x, "output": output.detach(), "running_mean": layer.running_mean}


def test_bf16_activations_have_f32_statistics() -> None:
    found = run_ranks(on_rank_in_bf16, 2)
    inputs = torch.cat([of_rank["input"] for of_rank in found], dim=1).double()  # [S, n * 64, C]
    mean = inputs.mean(dim=1)
    wanted = (inputs - mean[:, None]) / (inputs.var(dim=1, correction=0)[:, None] + 1e-5).sqrt()
    output = torch.cat([of_rank["output"].unflatten(0, (2, -1)) for of_rank in found], dim=1).double()
    # The last rounding alone: half a unit in the last place of bf16.
    assert ((output - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-5).all()
    torch.testing.assert_close(found[0]["running_mean"].double(), 0.9 * 0.1 * mean[0] + 0.1 * mean[1])


def test_a_batch_that_the_segments_do_not_divide_is_refused() -> None:
    layer = segment_batch_norm(make("rows"))
    with (
        segmented(layer, 2),
        pytest.raises(ValueError, match=r"found \[3, 3\] in 2 segments, expected \[segments \* B, channels, ...\]"),
    ):
        layer(torch.randn(3, CHANNELS, dtype=torch.float64))


def test_segments_end_with_their_context() -> None:
    layer = segment_batch_norm(make("rows"))
    with pytest.raises(KeyError), segmented(layer, 2):
        assert layer.segments == 2
        raise KeyError
    assert layer.segments == 1


class Foreign(nn.Module):
    """A normalisation by running statistics that is no torch BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(2))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm3d(2), nn.BatchNorm2d(2, affine=False), nn.BatchNorm1d(2, track_running_stats=False), Foreign()],
    ids=["BatchNorm3d", "no affine", "no running statistics", "foreign"],
)
def test_what_has_no_segmented_form_is_left_alone_and_refused_on_several_ranks(layer: nn.Module) -> None:
    module = segment_batch_norm(nn.Sequential(layer))
    assert module[0] is layer and not separable(module)
    with pytest.raises(UserError, match="has no statistics over several ranks; use one rank, or a ResNet"):
        require_statistics_of_all_ranks(module)
