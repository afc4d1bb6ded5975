"""CACR against loops over images and distances |x - y|^2 with autograd, in all its forms, on one rank and on several.

Gradients are compared on the tangent of the sphere, where those of |x - y|^2 and of 2 - 2 x.y agree.

Legend: B images of the global batch, V views, K queue rows, C channels.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from caco_fast.build import method_sections
from caco_fast.config import load_config, settings_of
from caco_fast.distributed import rank, world_size
from caco_fast.errors import UserError
from caco_fast.methods import Embeddings, build_method, registered
from caco_fast.methods.cacr import CACR, CACRConfig
from caco_fast.models import build_backbone, require_sizes
from caco_fast.ops.checks import BankUse
from tests.methods.stand_ins import ScriptedEncoders, small_pair
from tests.ranks import run_ranks

B, K, C, STEPS = 6, 7, 5, 3
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # Views, views with keys, settings.
    "batch": (3, 0, {"t_neg": 0.9}),
    "batch, two views, factors": (2, 0, {"alpha": 0.7, "beta": 1.3, "t_pos": 1.5}),
    "batch, positives": (4, 0, {"weights": "positives"}),
    "batch, negatives": (3, 0, {"weights": "negatives", "negatives": "rank"}),
    "batch, none": (3, 0, {"weights": "none"}),
    "batch, debiased": (5, 0, {"tau_plus": 0.1}),
    "queue": (3, 3, {"form": "queue", "queue_size": K}),
    "queue, two views, factors": (2, 2, {"form": "queue", "queue_size": K, "alpha": 0.7, "beta": 1.3, "t_neg": 0.9}),
    "queue, all ranks": (4, 4, {"form": "queue", "queue_size": K, "negatives": "all"}),
    "queue of few keys": (2, 2, {"form": "queue", "queue_size": 4, "negatives": "all"}),
    "global": (2, 2, {"form": "global", "temperature": 0.2}),
    "global, crops": (5, 2, {"form": "global"}),
    "global, all anchors": (3, 3, {"form": "global", "anchors": "all", "negatives": "rank"}),
    "global, euclidean": (4, 2, {"form": "global", "distance": "euclidean", "temperature": 0.14}),
}


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, C, dtype=torch.float64, generator=generator), dim=1)


def drawn(case: str, step: int, images: int = B) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys of the global batch."""
    views, keys, _ = CASES[case]
    queries = [unit(images, 100 * step + v) for v in range(views)]
    # Near their queries, as those of a trained pair are.
    return queries, [normalize(queries[v] + unit(images, 100 * step + 50 + v), dim=1) for v in range(keys)]


def make(case: str) -> CACR:
    method = CACR(CACRConfig(**CASES[case][2]), C).double()
    if method.config.form == "queue":
        method.queue.queue.copy_(unit(method.config.queue_size, 999))
    return method


def distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum()


def weighted(distances: Sequence[Tensor], exponents: Sequence[Tensor]) -> Tensor:
    """The mean of `distances` under the softmax of `exponents`, by sums of exponentials."""
    weights = [exponent.exp() for exponent in exponents]
    return sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights)


def by_hand(
    case: str, queries: Sequence[Tensor], keys: Sequence[Tensor], queue: Tensor | None, others: Sequence[Sequence[int]]
) -> Tensor:
    """The loss of the global batch; `others[i]` are the images among which image i has its negatives."""
    settings = {"alpha": 1.0, "beta": 1.0, "t_pos": 1.0, "t_neg": 2.0, "tau_plus": 0.0, "temperature": 1.0}
    settings |= {"form": "batch", "weights": "both", "distance": "rbf", **CASES[case][2]}
    views, images, t = range(len(queries)), range(len(queries[0])), settings["temperature"]
    terms = []
    if settings["form"] == "batch":
        t_pos = settings["t_pos"] * (settings["weights"] in ("both", "positives"))
        t_neg = settings["t_neg"] * (settings["weights"] in ("both", "negatives"))
        pairs = [(x, y) for x in views for y in views if x < y]
        for i in images:
            for x in views:
                pulls = [distance(queries[x][i], queries[m][i]) for m in views if m != x]
                pull = weighted(pulls, [t_pos * d for d in pulls])
                terms.append(settings["alpha"] * pull / len(views))
            for x, y in pairs:
                pushes = [distance(queries[x][i], queries[y][j]) for j in others[i]]
                push = weighted(pushes, [-t_neg * d for d in pushes])
                own = distance(queries[x][i], queries[y][i])
                push = (push - settings["tau_plus"] * own) / (1 - settings["tau_plus"])
                terms.append(-settings["beta"] * push / len(pairs))
    elif settings["form"] == "queue":
        for i in images:
            for x in views:
                pulls = [distance(queries[x][i], keys[m][i]) for m in views if m != x]
                pull = weighted(pulls, [settings["t_pos"] * d.detach() for d in pulls])
                pushes = [distance(queries[x][i], n) for n in queue]
                pushes += [distance(queries[x][i], queries[x][j]) for j in others[i]]
                push = weighted(pushes, [-settings["t_neg"] * d.detach() for d in pushes])
                terms.append((settings["alpha"] * pull - settings["beta"] * push) / len(views))
    else:
        for i in images:
            for a, anchor in enumerate(keys):
                costs, distances = [], []
                for m in views:
                    if m == a:
                        continue
                    logits = {j: queries[m][i] @ anchor[j] / t for j in (i, *others[i])}
                    if settings["distance"] == "rbf":
                        costs.append(2 * t * (sum(s.exp() for s in logits.values()).log() - logits[i]))
                    else:
                        far = [1 - t * logits[j] for j in others[i]]
                        costs.append((1 - t * logits[i]) - weighted(far, [-d.detach() / t for d in far]))
                    distances.append(distance(queries[m][i], anchor[i]).detach() / t)
                terms.append(weighted(costs, distances) / len(keys))
    return sum(terms) / len(images)


def tangent(gradient: Tensor, rows: Tensor) -> Tensor:
    return gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def negatives(case: str, ranks: int, images: int = B) -> list[list[int]]:
    """The images among which each image of the global batch has its negatives."""
    settings = {"negatives": "auto", "form": "batch", **CASES[case][2]}
    of_rank = settings["negatives"] == "rank" or (settings["negatives"] == "auto" and settings["form"] == "queue")
    size = images // ranks if of_rank else images
    return [[j for j in range(images) if j != i and j // size == i // size] for i in range(images)]


def three_steps(case: str, images: int = B) -> list[dict[str, Any]]:
    """Loss of the ranks, tangential gradients of their own queries under the mean of the ranks' losses, and queue."""
    method, found = make(case), []
    for step in range(STEPS):
        queries, keys = ([view.chunk(world_size())[rank()] for view in rows] for rows in drawn(case, step, images))
        queries = [rows.clone().requires_grad_() for rows in queries]
        output = method.loss(Embeddings(queries, keys))
        gradients = torch.autograd.grad(output.loss / world_size(), queries)
        method.update(output.rows, 1.0)
        state = {name: value.clone() for name, value in method.named_buffers() if name.startswith("queue")}
        tangents = [tangent(g, q.detach()) for g, q in zip(gradients, queries)]
        found.append({"loss": output.loss.detach(), "gradients": tangents, **state})
    return found


def check(case: str, ranks: list[list[dict[str, Any]]], images: int = B) -> None:
    queue = unit(CASES[case][2].get("queue_size", 1), 999)
    place = 0
    for step in range(STEPS):
        queries, keys = drawn(case, step, images)
        queries = [rows.requires_grad_() for rows in queries]
        loss = by_hand(case, queries, keys, queue, negatives(case, len(ranks), images))
        close(torch.stack([found[step]["loss"] for found in ranks]).mean(), loss.detach())
        for view, gradient in enumerate(torch.autograd.grad(loss, queries)):
            together = torch.cat([found[step]["gradients"][view] for found in ranks])
            close(together, tangent(gradient, queries[view].detach()))
        if CASES[case][2].get("form") != "queue":
            continue
        for key in keys[-1]:
            queue[place % len(queue)] = key
            place += 1
        for found in ranks:
            close(found[step]["queue.queue"], queue)
            assert int(found[step]["queue.pointer"]) == place % len(queue)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_by_hand(case: str) -> None:
    check(case, [three_steps(case)])


@pytest.mark.parametrize("case", ["queue", "global, crops"])
def test_one_image_is_enough_where_there_are_other_negatives(case: str) -> None:
    check(case, [three_steps(case, images=1)], images=1)


def all_cases() -> dict[str, list[dict[str, Any]]]:
    return {case: three_steps(case) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_together_are_those_by_hand(count: int) -> None:
    ranks = run_ranks(all_cases, count)
    for case in CASES:
        check(case, [found[case] for found in ranks])


def test_two_views_in_the_global_form_are_moco_v3_halved() -> None:
    (q_a, q_b), (k_a, k_b) = drawn("global", 0)
    t, labels = 0.2, torch.arange(B)
    of_moco_v3 = 2 * t * sum(nn.functional.cross_entropy(q @ k.T / t, labels) for q, k in ((q_a, k_b), (q_b, k_a)))
    output = make("global").loss(Embeddings([q_a, q_b], [k_a, k_b]))
    close(output.loss, of_moco_v3 / 2)


@pytest.mark.parametrize("case", ["batch", "queue", "global, euclidean"])
def test_it_is_as_exact_in_f32_as_f32_is(case: str) -> None:
    queries, keys = drawn(case, 0)
    wide = make(case)
    narrow = CACR(wide.config, C)
    narrow.load_state_dict(wide.state_dict())
    # Positives that nearly coincide.
    queries[1] = normalize(queries[0] + 1e-4 * queries[1], dim=1)
    found = []
    for method, dtype in ((wide, torch.float64), (narrow, torch.float32)):
        rows = [q.to(dtype).requires_grad_() for q in queries]
        loss = method.loss(Embeddings(rows, [k.to(dtype) for k in keys])).loss
        found.append([tangent(g, q.detach()).double() for g, q in zip(torch.autograd.grad(loss, rows), rows)])
    for exact, rounded in zip(*found):
        torch.testing.assert_close(rounded, exact, rtol=0, atol=3e-7)


def test_metrics_are_the_weighted_distances() -> None:
    output = make("batch").loss(Embeddings(drawn("batch", 0)[0]))
    assert output.loss.item() == pytest.approx(
        (output.metrics["attraction"] - output.metrics["repulsion"]).item(), rel=1e-12
    )
    probability = make("global").loss(Embeddings(*drawn("global", 0))).metrics["positive_probability"]
    assert 0 < probability.item() < 1


def test_its_use_of_the_queue_is_that_of_a_step() -> None:
    (use,) = CACR(CACRConfig(form="queue", queue_size=K), C).bank_uses(8, 5)
    assert use == BankUse("cacr.backend", "auto", 40, K, C, ((0.25,),))
    assert CACR(CACRConfig(), C).bank_uses(8, 5) == []


@pytest.mark.parametrize(
    "settings, sizes, calls",
    [
        ({}, [32, 32, 32], ["queries of 3"]),
        ({"form": "queue", "queue_size": K}, [32, 32, 32], ["queries of 3", "keys of 3"]),
        ({"form": "global"}, [32, 32, 16], ["queries of 3", "keys of 2"]),
        ({"form": "global", "anchors": "all"}, [32, 32, 16], ["queries of 3", "keys of 3"]),
    ],
)
def test_a_step_asks_for_the_keys_of_the_anchors(settings: dict[str, Any], sizes: list[int], calls: list[str]) -> None:
    config = CACRConfig(**settings)
    method, encoders = CACR(config, C), ScriptedEncoders(C)
    method.check_views(sizes)
    # Rows of images of other sizes differ in number here, as nothing else tells a scripted view's size.
    views = [normalize(torch.randn(4 if size == 32 else 5, C), dim=1) for size in sizes]
    embeddings = method.embed(views, encoders)
    assert encoders.calls == calls
    assert CACR.needs(config, {}).key_encoder == (len(calls) == 2)
    for rows in embeddings.queries:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_the_predictor_takes_its_statistics_per_view() -> None:
    method, pair = CACR(CACRConfig(form="global", predictor_hidden=8), C), small_pair(C)
    views = [torch.randn(4, 3, 2, 2), 3 + torch.randn(4, 3, 2, 2)]
    together = method.embed(views, pair).queries
    for view, rows in zip(views, together):
        torch.testing.assert_close(rows, method.embed([view], pair).queries[0])
    loss = method.loss(method.embed(views, pair)).loss
    loss.backward()
    assert all(value.grad is not None for value in method.parameters())


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"form": "bank"}, "cacr.form: found 'bank', expected one of batch, queue, global"),
        ({"weights": "some"}, "cacr.weights: found 'some', expected one of both, positives, negatives, none"),
        ({"negatives": "many"}, "cacr.negatives: found 'many', expected one of auto, rank, all"),
        ({"distance": "cosine"}, "cacr.distance: found 'cosine', expected one of rbf, euclidean"),
        ({"anchors": "few"}, "cacr.anchors: found 'few', expected one of large, all"),
        ({"t_neg": 0.0}, "cacr.t_neg: found 0.0, expected a number above 0"),
        ({"beta": -1.0}, "cacr.beta: found -1.0, expected 0 or more"),
        ({"alpha": math.nan}, "cacr.alpha: found nan, expected 0 or more"),
        ({"tau_plus": 1.0}, "cacr.tau_plus: found 1.0, expected a number in [0, 1)"),
        ({"predictor_hidden": 0}, "cacr.predictor_hidden: found 0, expected at least 1"),
        ({"backend": "gpu"}, "cacr.backend: found 'gpu', expected one of auto, reference, tiled, cuda"),
        (
            {"form": "queue", "tau_plus": 0.1},
            "cacr.tau_plus: found 0.1, but the form queue has no such setting; leave it at 0.0, or set cacr.form=batch",
        ),
        (
            {"form": "global", "beta": 2.0},
            "cacr.beta: found 2.0, but the form global has no such setting; leave it at 1.0, or set cacr.form=batch or "
            "queue",
        ),
        ({"queue_size": 9}, "cacr.queue_size: found 9, but the form batch has no such setting; leave it at 65536"),
        ({"form": "queue", "queue_size": 0}, "the key queue: found size 0 and dim 5, expected at least 1 each"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        CACR(CACRConfig(**settings), C)
    assert line in str(error.value)


@pytest.mark.parametrize(
    "form, sizes, line",
    [
        ("batch", [32], "views: found 1 views of an image, expected 2 or more for cacr; set views.0.count"),
        ("queue", [32, 16], "views: found sizes [32, 16], expected one size for cacr.form=queue; local crops need"),
        ("global", [16, 32, 32], "views: found sizes [16, 32, 32], expected the large ones first for cacr; change"),
    ],
)
def test_views_that_it_cannot_use_are_named(form: str, sizes: list[int], line: str) -> None:
    with pytest.raises(UserError) as error:
        registered("cacr").method.build(CACRConfig(form=form), C, {}).check_views(sizes)
    assert line in str(error.value)


@pytest.mark.parametrize("case", ["batch", "global, euclidean"])
def test_a_single_image_without_negatives_is_refused(case: str) -> None:
    with pytest.raises(UserError, match="trainer.batch_size: found 1 image in a batch, expected 2 or more for cacr"):
        make(case).loss(Embeddings(*drawn(case, 0, images=1)))


SMALL_ALEXNET = {
    **{"backbone.name": "small_alexnet", "projector.layers": 1, "projector.dim": 128, "cacr.form": "batch"},
    **{"optimizer.name": "sgd", "optimizer.lr": 0.12, "optimizer.scale_lr": True, "optimizer.weight_decay": 1e-4},
    **{"schedule.milestones": [155, 170, 185], "schedule.milestone_factor": 0.1, "schedule.warmup_epochs": 0.0},
    **{"trainer.epochs": 200, "trainer.batch_size": 128, "views.0.count": 5, "views.0.size": 32, "views.0.hue": 0.4},
    **{"views.0.jitter_p": 1.0, "views.0.brightness": 0.4, "views.0.contrast": 0.4, "views.0.saturation": 0.4},
    **{"views.0.grey_p": 0.2, "views.0.blur_p": 0.0, "views.0.scale": (0.2, 1.0), "views.0.flip_p": 0.5},
}
GLOBAL = {
    **{"cacr.form": "global", "cacr.predictor_hidden": 4096, "cacr.distance": "rbf", "projector.hidden": 4096},
    **{"projector.last_batch_norm": "plain", "projector.bias": False, "projector.dim": 256, "schedule.per": "step"},
    **{"trainer.batch_size": 4096, "schedule.final_ratio": 0.0, "schedule.key_momentum_rises": True},
}
RESNET = {
    **{"cacr.temperature": 1.0, "backbone.name": "resnet50", "projector.layers": 2, "optimizer.name": "lars"},
    **{"optimizer.lr": 0.3, "optimizer.weight_decay": 1.5e-6, "schedule.warmup_epochs": 10.0, "trainer.epochs": 1000},
    **{"schedule.key_momentum": 0.996},
}
RECIPES: dict[str, dict[str, Any]] = {
    **{
        f"{data}_small_alexnet_cacr{f'_{part}' if part != 'none' else ''}": {
            **SMALL_ALEXNET,
            **{"data.source": data, "data.imbalance": part, "cacr.t_neg": 0.9 if data == "cifar10" else 2.0},
        }
        for data in ("cifar10", "cifar100")
        for part in ("none", "linear", "exponential")
    },
    "imagenet_resnet50_cacr_queue_200ep": {
        **{"cacr.form": "queue", "cacr.queue_size": 65536, "cacr.t_neg": 2.0, "cacr.negatives": "auto"},
        **{"views.0.count": 5, "views.0.size": 224, "optimizer.lr": 0.03, "schedule.key_momentum": 0.999},
        **{"optimizer.name": "sgd", "projector.dim": 128, "trainer.batch_size": 256, "trainer.epochs": 200},
    },
    "imagenet_resnet50_cacr_global_1000ep_batch4096": {**GLOBAL, **RESNET, "views.1.solarize_p": 0.2},
    "imagenet_resnet50_cacr_global_multicrop": {**GLOBAL, **RESNET, "views.1.count": 8, "views.1.size": 96},
    "imagenet_vit_base_cacr_global_300ep_batch4096": {
        **GLOBAL,
        **{"backbone.name": "vit_base_patch16_224", "backbone.options": {}, "optimizer.name": "adamw"},
        **{
            "optimizer.lr": 1.5e-4,
            "optimizer.weight_decay": 0.1,
            "schedule.warmup_epochs": 40.0,
            "trainer.epochs": 300,
        },
        **{"cacr.temperature": 0.2, "projector.layers": 3},
    },
    "small_cacr": {"cacr.form": "batch", "data.source": "embedded"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_its_configurations_are_the_recipes_and_build(name: str) -> None:
    config = load_config(name)
    found = settings_of(config)
    assert config.method == "cacr" and {key: found[key] for key in RECIPES[name]} == RECIPES[name]
    # The widths of the predictor and the queue need no memory here.
    with torch.device("meta"):
        method = build_method("cacr", config.projector.dim, method_sections(config))
        backbone = build_backbone(config.backbone, channels=3)
    method.check_views([view.size for view in config.views for _ in range(view.count)])
    require_sizes(config.backbone, {"views": (config.views[0].size,) * 2})
    assert backbone.num_features > 0
