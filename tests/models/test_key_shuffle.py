"""BatchNorm over groups of images, and keys shuffled over groups and ranks, against loops over the groups.

Legend: B images of the global batch, G images of a group, C embedding size, n ranks.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from caco_fast.distributed import all_reduce_sum, count_traffic, rank, world_size
from caco_fast.engine.step import Rates
from caco_fast.errors import UserError
from caco_fast.methods import MoCo, MoCoConfig
from caco_fast.models import Encoder, EncoderPair, group_batch_norm, segment_batch_norm
from caco_fast.models.batch_norm import SegmentedBatchNorm, add_norm_sets, segmented
from caco_fast.models.key_shuffle import KeyShuffle
from tests.methods.small_methods import Predicting, Temperature
from tests.methods.stand_ins import sgd_step, small_pair
from tests.ranks import run_ranks

# 1, 2 and 3 ranks have whole groups: 6, 3 and 2.
B, G, C, STEPS, SEED = 12, 2, 5, 3, 7
MOMENTUM = 0.3


class Norm(nn.Module):
    """BatchNorm by its formula, of groups of `images` rows; the running statistics take the mean over the groups."""

    def __init__(self, channels: int, images: int) -> None:
        super().__init__()
        self.images = images
        self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float64))
        self.means, self.variances = torch.zeros(channels).double(), torch.ones(channels).double()

    def forward(self, views: Tensor) -> Tensor:  # [views, B, channels, ...]
        return torch.stack([self.one_view(view) for view in views])

    def one_view(self, view: Tensor) -> Tensor:
        outputs, means, variances = [], [], []
        for first in range(0, len(view), self.images):
            group = view[first : first + self.images]
            values = group.movedim(1, 0).flatten(1)  # [channels, values]
            mean = values.sum(1) / values.shape[1]
            squares = (values - mean[:, None]).square().sum(1)
            shape = (1, -1) + (1,) * (group.dim() - 2)
            scale = self.weight / (squares / values.shape[1] + 1e-5).sqrt()
            outputs.append((group - mean.view(shape)) * scale.view(shape) + self.bias.view(shape))
            means.append(mean.detach())
            variances.append(squares.detach() / (values.shape[1] - 1))
        self.means = (1 - MOMENTUM) * self.means + MOMENTUM * sum(means) / len(means)
        self.variances = (1 - MOMENTUM) * self.variances + MOMENTUM * sum(variances) / len(variances)
        return torch.cat(outputs)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("images", [2, 3, 6])
@pytest.mark.parametrize("shape", [(4,), (4, 3, 5)], ids=["rows", "maps"])
def test_groups_have_statistics_of_their_own(shape: tuple[int, ...], images: int, views: int) -> None:
    kind = nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d
    layer = segment_batch_norm(kind(4, momentum=MOMENTUM).double())
    group_batch_norm(layer, images)
    wanted = Norm(4, images)
    for own, theirs in zip(layer.parameters(), wanted.parameters(), strict=True):
        nn.init.normal_(own)
        theirs.data.copy_(own.data)
    for step in range(3):
        # Groups of other means and widths than the batch.
        values = 10 * torch.randn(views, 6, *[1] * len(shape)).double() + torch.randn(views, 6, *shape).double()
        x, y = values.clone().requires_grad_(), values.clone().requires_grad_()
        grad = torch.randn(views, 6, *shape, dtype=torch.float64)
        with segmented(layer, views):
            output = layer(x.flatten(0, 1)).unflatten(0, (views, 6))
        expected = wanted(y)
        output.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.running_mean, wanted.means, rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.running_var, wanted.variances, rtol=0, atol=1e-10)
        assert int(layer.num_batches_tracked) == (1 + step) * views
    for own, theirs in zip(layer.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=0, atol=1e-9)
    layer.eval()
    x = torch.randn(7, *shape, dtype=torch.float64)
    plain = kind(4).double().eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


def test_one_group_is_the_plain_batch_norm_bit_for_bit() -> None:
    layers = [segment_batch_norm(nn.BatchNorm2d(4)) for _ in range(2)]
    group_batch_norm(layers[0], 6)
    for _ in range(2):
        x = torch.randn(6, 4, 3, 3)
        assert torch.equal(layers[0](x), layers[1](x))
    for name, value in layers[1].state_dict().items():
        assert torch.equal(layers[0].state_dict()[name], value)


def test_further_sets_have_the_same_groups() -> None:
    layer = segment_batch_norm(nn.Sequential(nn.BatchNorm1d(4)))
    add_norm_sets(layer, 2)
    group_batch_norm(layer, 3)
    (further,) = layer[0].further
    with segmented(layer, 1, 1):
        output = layer(torch.randn(6, 4))
    assert isinstance(further, SegmentedBatchNorm) and further.images == 3
    for group in output.chunk(2):
        torch.testing.assert_close(group.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-6)


def test_what_has_no_groups_is_named() -> None:
    module = nn.Sequential(nn.BatchNorm3d(2))
    group_batch_norm(module, 0)
    with pytest.raises(
        UserError, match="trainer.batch_norm_images: found 4, but BatchNorm3d.* set it to 0, or use a R"
    ):
        group_batch_norm(module, 4)
    layer = segment_batch_norm(nn.BatchNorm1d(2))
    group_batch_norm(layer, 4)
    with pytest.raises(ValueError, match="found 6 rows, expected groups of 4"):
        layer(torch.randn(6, 2))


# The shuffle


def test_orders_are_fresh_for_every_view_and_seed() -> None:
    orders = []
    for seed in (0, 1, 2**31 - 1, -5):
        shuffle = KeyShuffle(seed)
        for view in range(4):
            order, back = shuffle.next_order(40)
            assert torch.equal(order.sort().values, torch.arange(40))
            assert torch.equal(order[back], torch.arange(40))
            assert int(shuffle.count) == view + 1
            orders.append(tuple(order.tolist()))
    assert len(set(orders)) == len(orders)


def test_every_image_comes_to_every_place_as_often() -> None:
    shuffle, draws, size = KeyShuffle(0), 2000, 6
    found = torch.zeros(size, size)
    pairs = 0
    for _ in range(draws):
        order, _ = shuffle.next_order(size)
        found[torch.arange(size), order] += 1
        pairs += int(order[0] + 1 == order[1])
    # Five standard deviations of a count.
    p = 1 / size
    assert (found - draws * p).abs().max() < 5 * math.sqrt(draws * p * (1 - p))
    assert abs(pairs - draws * p) < 5 * math.sqrt(draws * p * (1 - p))


def test_a_resumed_shuffle_goes_on() -> None:
    straight, resumed = KeyShuffle(3), KeyShuffle(3)
    straight.next_order(9)
    resumed.load_state_dict(straight.state_dict())
    assert torch.equal(straight.next_order(9)[0], resumed.next_order(9)[0])


class WideEncoder(Encoder):
    """In f64: groups of two images make rounding errors large."""

    def _embed(self, view: Tensor) -> Tensor:
        return normalize(self.projector(self.backbone(view)), dim=1)


def grouped_pair(shuffle: bool = True, joint_views: bool = False) -> EncoderPair:
    torch.manual_seed(0)
    parts = small_pair(C).query
    query = WideEncoder(parts.backbone, parts.projector, joint_views=joint_views).double()
    group_batch_norm(query, G)
    return EncoderPair(query, shuffle=KeyShuffle(SEED) if shuffle else None)


def images() -> list[Tensor]:
    """Both views of the global batch."""
    return [torch.randn(B, 3, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last) for _ in range(2)]


def key_by_hand(encoder: Encoder, images: Tensor, order: list[int]) -> Tensor:
    """Keys of the global batch, where BatchNorm sees groups of G images in this order; in the order of the images."""
    _, first, _ = encoder.backbone
    second, norm, _, last = encoder.projector
    keys: dict[int, Tensor] = {}
    for start in range(0, B, G):
        members = order[start : start + G]
        x = torch.stack([images[i] for i in members]).flatten(1)
        x = (x @ first.weight.T + first.bias).relu() @ second.weight.T
        x = (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
        x = x.relu() @ last.weight.T + last.bias
        keys |= {i: row / row.norm() for i, row in zip(members, x)}
    return torch.stack([keys[i] for i in range(B)])


def own(rows: Tensor) -> Tensor:
    return rows.chunk(world_size())[rank()]


def keys_of_a_rank() -> dict[str, Any]:
    """Keys of two views over a few steps; the bytes; queries and their gradients with and without the shuffle."""
    found: dict[str, Any] = {"keys": [], "plain keys": []}
    pair, plain = grouped_pair(), grouped_pair(shuffle=False)
    torch.manual_seed(1)
    for _ in range(STEPS):
        views = images()
        with count_traffic() as traffic:
            found["keys"].append(torch.stack(pair.keys([own(view) for view in views])))
        found["plain keys"].append(torch.stack(plain.keys([own(view) for view in views])))
        found["payload"] = dict(traffic.payload)
        for name, of in (("queries", pair), ("plain queries", plain)):
            queries = of.queries([own(view) for view in views])
            gradients = torch.autograd.grad(queries[0][:, 0].sum() - queries[1][:, 1].sum(), of.query.parameters())
            found[name] = [*(query.detach() for query in queries), *gradients]
    pair.key.eval()
    count = pair.shuffle.count.clone()
    found["in evaluation"] = pair.keys([own(views[0])])[0]
    found["counted"] = torch.equal(pair.shuffle.count, count)
    found["of evaluation"] = pair.key(own(views[0]))[0]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shuffled_keys_are_those_of_the_permuted_groups_in_order(ranks: int) -> None:
    of_ranks = [keys_of_a_rank()] if ranks == 1 else run_ranks(keys_of_a_rank, ranks)
    pair, shuffle = grouped_pair(), KeyShuffle(SEED)
    torch.manual_seed(1)
    for step in range(STEPS):
        views = images()
        keys, plain = (torch.cat([found[name][step] for found in of_ranks], dim=1) for name in ("keys", "plain keys"))
        for view, of_view in enumerate(views):
            order = shuffle.next_order(B // world_size())[0].tolist()
            wanted = key_by_hand(pair.key, of_view, order)
            torch.testing.assert_close(keys[view], wanted, rtol=0, atol=1e-10)
            torch.testing.assert_close(plain[view], key_by_hand(pair.key, of_view, list(range(B))), rtol=0, atol=1e-10)
            assert (keys[view] - plain[view]).abs().max() > 0.1
    for found in of_ranks:
        for one, other in zip(found["queries"], found["plain queries"], strict=True):
            assert torch.equal(one, other)
        assert torch.equal(found["in evaluation"], found["of evaluation"]) and found["counted"]
        # The images of all ranks, then the keys of all.
        assert found["payload"] == ({"all_gather_rows": 2 * 8 * B * (12 + C)} if ranks > 1 else {})


def trained(method: str) -> dict[str, Any]:
    """Steps on real encoders with the mean gradient of all ranks, and the state of the encoders after them."""
    pair = grouped_pair()
    torch.manual_seed(2)
    if method == "moco":
        made = MoCo(MoCoConfig(queue_size=2 * B, symmetric=True), C).double()
    else:
        made = segment_batch_norm(Predicting(Temperature(), C)).double()
        group_batch_norm(made, G)
    step = sgd_step(made, pair)
    step.enter(made.phases(B)[-1])
    losses = []
    for _ in range(STEPS):
        step.interval.clear()
        step([own(view) for view in images()], Rates(0.05, 0.99, 1.0))
        losses.append(all_reduce_sum(step.interval.sums["loss"].clone()) / world_size())
    return {"losses": torch.stack(losses), **pair.state_dict(), **made.state_dict()}


def both_methods() -> list[dict[str, Any]]:
    return [trained("moco"), trained("predictor")]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_as_one_with_the_same_groups(ranks: int) -> None:
    """Running statistics too, which every rank holds alike, those of a method's own layers among them."""
    of_ranks = run_ranks(both_methods, ranks)
    for number, wanted in enumerate(both_methods()):
        for found in of_ranks:
            for name, value in wanted.items():
                torch.testing.assert_close(found[number][name], value, rtol=0, atol=1e-10, msg=f"{name} differs")
                assert torch.equal(found[number][name], of_ranks[0][number][name]), name


def test_a_pair_is_loaded_with_and_without_the_shuffle() -> None:
    with_, without = grouped_pair(), grouped_pair(shuffle=False)
    with_.keys(images()[:1])
    without.load_state_dict(with_.state_dict())
    again = grouped_pair()
    again.load_state_dict(without.state_dict())
    assert int(with_.shuffle.count) == 1 and int(again.shuffle.count) == 0
    again.load_state_dict(with_.state_dict())
    assert int(again.shuffle.count) == 1


def test_views_together_are_shuffled_as_apart() -> None:
    apart, together = grouped_pair(), grouped_pair(joint_views=True)
    views = images()
    for one, other in zip(apart.keys(views), together.keys(views), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
