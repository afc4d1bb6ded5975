"""CACR (Zheng et al., arXiv 2105.03746): farther positives attract more, and nearer negatives repel more.

Three forms: within the batch, with a queue of keys, and with a predictor and the keys of the global batch. The formulas
are in docs/method.md.

Legend: B images on this rank, V views, K queue rows, C embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.bank import KeyQueue
from caco_fast.distributed import all_gather_rows, all_gather_rows_with_gradient, world_size
from caco_fast.errors import UserError
from caco_fast.methods.base import (
    BACKEND_HELP,
    Embeddings,
    EncoderNeeds,
    Method,
    StepOutput,
    check_settings,
    register,
    use_of,
)
from caco_fast.methods.cacr_loss import anchored, attraction, repulsion, repulsion_with_queue
from caco_fast.models import EncoderPair, build_mlp
from caco_fast.ops.checks import BankUse
from caco_fast.ops.rates import Rate
from caco_fast.settings import require_at_least, setting

CHOICES = {
    "form": ("batch", "queue", "global"),
    "weights": ("both", "positives", "negatives", "none"),
    "negatives": ("auto", "rank", "all"),
    "distance": ("rbf", "euclidean"),
    "anchors": ("large", "all"),
}
# The settings that not every form has, with the forms that do.
FORMS_WITH = {
    **dict.fromkeys(("alpha", "beta", "t_pos", "t_neg"), ("batch", "queue")),
    **dict.fromkeys(("weights", "tau_plus"), ("batch",)),
    **dict.fromkeys(("queue_size", "backend"), ("queue",)),
    **dict.fromkeys(("temperature", "distance", "anchors", "predictor_hidden"), ("global",)),
}


@dataclass(frozen=True)
class CACRConfig:
    form: str = setting(
        "batch",
        "batch: one encoder, all within the batch; queue: a key encoder and a queue of its keys; global: a predictor, "
        "and the keys of the global batch",
    )
    negatives: str = setting(
        "auto",
        "whose images are the batch's negatives: rank: of this rank; all: of all ranks; auto: queue rank, else all",
    )
    alpha: float = setting(1.0, "batch, queue: factor of the attraction")
    beta: float = setting(1.0, "batch, queue: factor of the repulsion")
    t_pos: float = setting(1.0, "batch, queue: the larger, the more the farthest positives count")
    t_neg: float = setting(2.0, "batch, queue: the larger, the more the nearest negatives count (0.9 for CIFAR-10)")
    weights: str = setting("both", "batch: what is weighted by its distance: both, positives, negatives, or none")
    tau_plus: float = setting(0.0, "batch: share of an image's negatives that are of its own class; 0.1: debiased")
    queue_size: int = setting(65536, "queue: K, keys in the queue")
    temperature: float = setting(1.0, "global: T, temperature of all softmaxes (0.2 for ViT-B)")
    distance: str = setting("rbf", "global: cost of a query: rbf (a cross-entropy) or euclidean")
    anchors: str = setting("large", "global: views whose keys are anchors: large (as large as the first) or all")
    predictor_hidden: int = setting(4096, "global: width of the predictor's hidden layer")
    backend: str = setting("auto", BACKEND_HELP)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"cacr.{name}: found '{getattr(self, name)}', expected one of {', '.join(choices)}")
        check_settings("cacr", self, ("t_pos", "t_neg", "temperature"))
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"cacr.{name}: found {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.tau_plus < 1:
            raise UserError(f"cacr.tau_plus: found {self.tau_plus}, expected a number in [0, 1)")
        require_at_least("cacr.predictor_hidden", self.predictor_hidden, 1)
        for of in fields(self):
            if self.form not in FORMS_WITH.get(of.name, (self.form,)) and getattr(self, of.name) != of.default:
                raise UserError(
                    f"cacr.{of.name}: found {getattr(self, of.name)}, but the form {self.form} has no such setting; "
                    f"leave it at {of.default}, or set cacr.form={' or '.join(FORMS_WITH[of.name])}"
                )


@register("cacr", CACRConfig, "CACR: attraction and repulsion weighted by distance, in three forms")
class CACR(Method):
    """Attraction to the other views of an image and repulsion from other images, each weighted by its distance."""

    shown = ("attraction", "repulsion", "positive_probability")

    def __init__(self, config: CACRConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        if config.form == "queue":
            self.queue = KeyQueue(config.queue_size, dim, backend=config.backend)
        if config.form == "global":
            self.predictor = build_mlp([dim, config.predictor_hidden, dim])

    @classmethod
    def needs(cls, config: CACRConfig, sections: Mapping[str, Any]) -> EncoderNeeds:
        return EncoderNeeds(key_encoder=config.form != "batch")

    @property
    def over_all_ranks(self) -> bool:
        return self.config.negatives == "all" or (self.config.negatives == "auto" and self.config.form != "queue")

    def check_views(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2:
            raise UserError(
                f"views: found {len(sizes)} views of an image, expected 2 or more for cacr; set views.0.count"
            )
        if self.config.form != "global" and len(set(sizes)) > 1:
            raise UserError(
                f"views: found sizes {list(sizes)}, expected one size for cacr.form={self.config.form}; "
                "local crops need cacr.form=global"
            )
        if list(sizes) != sorted(sizes, reverse=True):
            raise UserError(
                f"views: found sizes {list(sizes)}, expected the large ones first for cacr; change their order"
            )

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        if self.config.form == "batch":
            return Embeddings(encoders.queries(views))
        if self.config.form == "queue":
            return Embeddings(encoders.queries(views), encoders.keys(views))
        # View by view, so that BatchNorm takes its statistics per view.
        queries = [normalize(self.predictor(rows), dim=1) for rows in encoders.queries(views)]
        large = [view for view in views if view.shape == views[0].shape]
        return Embeddings(queries, encoders.keys(large if self.config.anchors == "large" else views))

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        form = self.config.form
        images = embeddings.queries[0].shape[0] * (world_size() if self.over_all_ranks else 1)
        if images == 1 and (form == "batch" or self.config.distance == "euclidean"):
            raise UserError(
                f"trainer.batch_size: found 1 image in a batch, expected 2 or more for cacr.form={form}, "
                "whose negatives are the other images; raise it, or set cacr.negatives=all"
            )
        return {"batch": self._within_batch, "queue": self._with_queue, "global": self._anchored}[form](embeddings)

    def _within_batch(self, embeddings: Embeddings) -> StepOutput:
        """alpha A over all views as anchors, and - beta R over the pairs of views x < y."""
        views, config = embeddings.queries, self.config
        # A weight of e^0 for each is the plain mean.
        t_pos = config.t_pos if config.weights in ("both", "positives") else 0.0
        t_neg = config.t_neg if config.weights in ("both", "negatives") else 0.0
        attractions = [attraction(z, _others(views, x), t_pos, constant=False) for x, z in enumerate(views)]
        batch = self._batch(views)
        repulsions = [
            repulsion(views[x], batch[y], t_neg, config.tau_plus) for x, y in combinations(range(len(views)), 2)
        ]
        return self._weighted(attractions, repulsions)

    def _with_queue(self, embeddings: Embeddings) -> StepOutput:
        """alpha A - beta R of each view, whose negatives are the queue and the queries of the same view."""
        queries, keys, t_neg = embeddings.queries, embeddings.keys, self.config.t_neg
        count = len(queries)
        # Each view has similarities of its own.
        lse, mean_row = self.queue.attend(torch.cat(list(queries)).detach(), 1 / (2 * t_neg))
        per_view = zip(queries, self._batch(queries), lse.chunk(count), mean_row.chunk(count), strict=True)
        attractions = [attraction(q, _others(keys, x), self.config.t_pos, constant=True) for x, q in enumerate(queries)]
        repulsions = [repulsion_with_queue(q, batch, of_q, mean, t_neg) for q, batch, of_q, mean in per_view]
        output = self._weighted(attractions, repulsions)
        output.rows = (keys[-1],)
        return output

    def _anchored(self, embeddings: Embeddings) -> StepOutput:
        """The mean over the anchors, which are keys, of the cost of their images' other queries."""
        found = []
        for view, keys in enumerate(embeddings.keys):
            batch = all_gather_rows(keys) if self.over_all_ranks else keys
            queries = _others(embeddings.queries, view)
            found.append(anchored(queries, keys, batch, self.config.temperature, self.config.distance == "euclidean"))
        loss, probability = (torch.stack(values).mean() for values in zip(*found))
        return StepOutput(loss, {"positive_probability": probability})

    def _weighted(self, attractions: Sequence[Tensor], repulsions: Sequence[Tensor]) -> StepOutput:
        pull, push = torch.stack(list(attractions)).mean(), torch.stack(list(repulsions)).mean()
        metrics = {"attraction": pull.detach(), "repulsion": push.detach()}
        return StepOutput(self.config.alpha * pull - self.config.beta * push, metrics)

    def _batch(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """The rows that hold the negatives of each view, with gradient: [B, C] of this rank, or those of all ranks."""
        if not self.over_all_ranks:
            return views
        return all_gather_rows_with_gradient(torch.stack(list(views), dim=1)).unbind(dim=1)

    def update(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        for keys in rows:
            self.queue.enqueue(keys, skip=skip)

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        if self.config.form != "queue":
            return []
        temperature = 1 / (2 * self.config.t_neg)
        return [use_of(self.queue, f"{self.section}.backend", images * views, temperatures=((temperature,),))]


def _others(views: Sequence[Tensor], left_out: int) -> list[Tensor]:
    return [rows for view, rows in enumerate(views) if view != left_out]
