"""The encoder's embeddings, and the pair of query and key encoder.

Legend: B images, C embedding size.
"""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from caco_fast.models import BackboneConfig, Encoder, EncoderPair, ProjectorConfig, build_encoder_pair

B, C = 4, 6


def make(joint_views: bool = False) -> EncoderPair:
    torch.manual_seed(3)
    backbone = BackboneConfig("resnet18", "small_stride2", {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]})
    return build_encoder_pair(backbone, ProjectorConfig(hidden=16, dim=C), channels=1, joint_views=joint_views)


@pytest.fixture
def pair() -> EncoderPair:
    return make()


def images() -> Tensor:
    return torch.randn(B, 1, 28, 28)


def parameters(encoder: Encoder) -> list[Tensor]:
    return [p.detach().clone() for p in encoder.parameters()]


def buffers(encoder: Encoder) -> list[Tensor]:
    return [b.clone() for b in encoder.buffers()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def shift_query(pair: EncoderPair) -> None:
    with torch.no_grad():
        for p in pair.query.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["f32", "bf16", "fp16"])
def test_embeddings_are_unit_rows_in_f32(pair: EncoderPair, autocast: torch.dtype | None) -> None:
    pair.query.autocast = autocast
    computed: list[torch.dtype] = []
    pair.query.projector.register_forward_hook(lambda _m, _i, out: computed.append(out.dtype))
    (embedding,) = pair.queries([images()])
    assert computed == [autocast or torch.float32]
    assert embedding.dtype == torch.float32 and embedding.shape == (B, C)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(B), rtol=0, atol=1e-6)
    embedding.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in pair.query.parameters())


def test_every_view_is_a_forward_of_its_own(pair: EncoderPair) -> None:
    views = [images(), 3 + images()]
    together = pair.queries(views)
    assert int(pair.query.backbone.bn1.num_batches_tracked) == 2
    for view, embedding in zip(views, together):
        torch.testing.assert_close(pair.queries([view])[0], embedding)


def test_views_together_are_what_separate_forwards_give() -> None:
    """Two large views and three small ones, in f64; the second forward finds the running statistics of the first."""
    apart, together = make().double(), make(joint_views=True).double()
    sizes: list[int] = []
    together.query.backbone.conv1.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    for _ in range(2):
        views = [s + torch.randn(B, 1, side, side, dtype=torch.float64) for s, side in enumerate([28, 28, 16, 16, 16])]
        results = []
        for pair in (apart, together):
            pair.query.zero_grad()
            queries, keys = pair.queries(views), pair.keys(views[:2])
            sum((i + 1) * q[:, 0].sum() for i, q in enumerate(queries)).backward()
            results.append([*queries, *keys, *(p.grad for p in pair.query.parameters()), *pair.buffers()])
        # Embeddings leave the encoder in f32.
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert sizes == 2 * [2 * B, 3 * B]
    assert int(together.query.backbone.bn1.num_batches_tracked) == 10
    assert int(together.key.backbone.bn1.num_batches_tracked) == 4


def test_views_in_evaluation_mode_pass_together_unchanged() -> None:
    pair = make(joint_views=True).eval()
    views = [images(), 3 + images()]
    for view, embedding in zip(views, pair.queries(views)):
        torch.testing.assert_close(pair.queries([view])[0], embedding)
    assert int(pair.query.backbone.bn1.num_batches_tracked) == 0


def test_a_batch_norm_of_another_kind_keeps_every_view_a_forward_of_its_own() -> None:
    encoder = Encoder(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), nn.Linear(784, C), joint_views=True)
    assert not encoder.joint_views
    encoder(images(), 3 + images())
    assert int(encoder.backbone[0].num_batches_tracked) == 2


def test_key_starts_as_a_copy_without_gradient(pair: EncoderPair) -> None:
    assert same(parameters(pair.key), parameters(pair.query))
    assert not any(p.requires_grad for p in pair.key.parameters())
    assert not {p.data_ptr() for p in pair.key.parameters()} & {p.data_ptr() for p in pair.query.parameters()}
    (key,) = pair.keys([images()])
    assert not key.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
def test_advance_is_the_ema_of_the_parameters_alone(pair: EncoderPair, momentum: float) -> None:
    shift_query(pair)
    pair.queries([images()])
    key, query, key_buffers = parameters(pair.key), parameters(pair.query), buffers(pair.key)
    pair.advance_key(momentum)
    for found, g, f in zip(parameters(pair.key), key, query):
        torch.testing.assert_close(found, momentum * g + (1 - momentum) * f)
    assert same(parameters(pair.query), query)
    assert same(buffers(pair.key), key_buffers)


def test_copy_sets_the_key_to_the_query_but_for_its_buffers(pair: EncoderPair) -> None:
    shift_query(pair)
    pair.queries([images()])
    key_buffers = buffers(pair.key)
    pair.copy_query_to_key()
    assert same(parameters(pair.key), parameters(pair.query))
    assert same(buffers(pair.key), key_buffers) and not same(key_buffers, buffers(pair.query))


def test_batch_norm_buffers_of_the_key_come_from_its_own_forwards(pair: EncoderPair) -> None:
    query_buffers, before = buffers(pair.query), buffers(pair.key)
    pair.keys([images()])
    assert same(buffers(pair.query), query_buffers)
    assert not same(buffers(pair.key), before)
    assert int(pair.key.backbone.bn1.num_batches_tracked) == 1


def test_keys_are_paired_with_queries_by_name(pair: EncoderPair) -> None:
    """The query encoder may have more parameters than the key encoder, wherever they are among its own."""
    pair.query.backbone = nn.Sequential(
        OrderedDict(extra=nn.Linear(1, 1), **dict(pair.query.backbone.named_children()))
    )
    shift_query(pair)
    named, before = dict(pair.query.named_parameters()), dict(pair.key.named_parameters())
    wanted = {name: 0.5 * value + 0.5 * named[name] for name, value in before.items()}
    pair.advance_key(0.5)
    for name, value in pair.key.named_parameters():
        torch.testing.assert_close(value, wanted[name])


def test_without_a_key_encoder_there_is_nothing_to_average(pair: EncoderPair) -> None:
    alone = EncoderPair(pair.query, key_encoder=False)
    assert all(name.startswith("query.") for name in alone.state_dict())
    alone.advance_key(0.9)
    alone.copy_query_to_key()
    with pytest.raises(RuntimeError, match="`key_encoder` is False"):
        alone.keys([images()])


def test_embed_gives_gradients_to_the_views_alone(pair: EncoderPair) -> None:
    view = images().requires_grad_()
    (constant,) = pair.embed([view])
    constant[:, 0].sum().backward()
    assert view.grad is not None and all(p.grad is None for p in pair.query.parameters())
    assert all(p.requires_grad for p in pair.query.parameters())
    pair.query.eval(), pair.key.eval()
    assert torch.equal(pair.embed([view])[0], pair.queries([view])[0])
