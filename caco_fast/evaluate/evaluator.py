"""The evaluation of a run: weighted kNN while it trains, and a linear probe at its end.

Legend: N rows of this rank, D feature size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import mean
from typing import TypeVar

import torch
from torch import Tensor, nn

from caco_fast.distributed import all_gather_objects, all_reduce_sum
from caco_fast.errors import UserError
from caco_fast.evaluate.features import SizedBatches, extract_features
from caco_fast.evaluate.few_labels import few_labels
from caco_fast.evaluate.knn import knn_accuracy
from caco_fast.evaluate.linear_probe import linear_probe
from caco_fast.models import Encoder
from caco_fast.settings import require_at_least, setting

Result = TypeVar("Result")


@dataclass(frozen=True)
class EvaluationConfig:
    every_epochs: int = setting(10, "epochs between two evaluations; 0: none during the run")
    held_out: float = setting(
        0.0, "share of the training images that is held out, to log the method's loss on it; 0: none, and labels needed"
    )
    k: list[int] = setting([20, 200], "numbers of neighbours that vote; the first one chooses the best checkpoint")
    temperature: float = setting(0.2, "temperature of the votes: a neighbour's vote weighs exp(cosine / temperature)")
    train_share: float = setting(1.0, "share of the training set that the neighbours come from (0 to 1)")
    batch_size: int = setting(256, "images per forward on each rank")
    linear_probe: bool = setting(False, "logistic regression on the features of that share, at the end of the run")
    few_labels: int = setting(
        0,
        "at the end of the run, logistic regression on so many labelled images of each class, mean of 5 draws; 0: none",
    )
    baselines: bool = setting(False, "the same scores for raw pixels and for the random encoder, before training")

    def due(self, epochs_done: int, last: bool) -> bool:
        """Whether an evaluation follows the epoch that ended."""
        return self.every_epochs > 0 and (last or epochs_done % self.every_epochs == 0)

    @property
    def holds_out(self) -> bool:
        return self.held_out > 0 and self.every_epochs > 0

    @property
    def wanted(self) -> bool:
        """Whether anything is evaluated. Data without labels can't be."""
        return self.every_epochs > 0 or self.linear_probe or self.few_labels > 0 or self.baselines

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise UserError(f"evaluation.k: found {list(self.k)}, expected a list of numbers of at least 1")
        if len(set(self.k)) < len(self.k):
            raise UserError(f"evaluation.k: found {list(self.k)}, expected every number once")
        require_at_least("evaluation.every_epochs", self.every_epochs, 0)
        require_at_least("evaluation.batch_size", self.batch_size, 1)
        require_at_least("evaluation.few_labels", self.few_labels, 0)
        if self.few_labels == 1:
            raise UserError("evaluation.few_labels: found 1, expected 0 or at least 2, for the choice of a penalty")
        if not 0 < self.train_share <= 1:
            raise UserError(f"evaluation.train_share: found {self.train_share}, expected a number in (0, 1]")
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"evaluation.held_out: found {self.held_out}, expected a share between 0 and 0.5")
        if not self.temperature > 0:
            raise UserError(f"evaluation.temperature: found {self.temperature}, expected a positive number")


class _Pixels(nn.Module):
    """An encoder whose features are the pixels."""

    def __init__(self, denormalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.denormalise = denormalise

    def forward(self, images: Tensor) -> Tensor:
        return self.denormalise(images).flatten(1)


class Evaluator:
    """An evaluator of features: the training share predicts the labels of the test set.

    Every rank gives its own shard of both sets, and every rank must call each method. The loaders give (images, labels,
    index). `classes` is the number of labels, and `denormalise` turns images into pixels.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        train: SizedBatches,
        test: SizedBatches,
        *,
        classes: int,
        denormalise: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.config = config
        self.train = train
        self.test = test
        self.classes = classes
        self.denormalise = denormalise
        self.device = device

    def due(self, epochs_done: int, last: bool) -> bool:
        return self.config.due(epochs_done, last)

    def knn(self, encoder: Encoder) -> dict[str, float]:
        """The kNN accuracy of the backbone's features for every configured k, in order: {"knn_200": per cent, ...}."""
        return self._knn(*self._extract(encoder.backbone, encoder.precision(self.device)))

    def scores(self, encoder: Encoder, knn: dict[str, float] | None = None) -> dict[str, float]:
        """The kNN accuracies, and with `linear_probe` and `few_labels` {"linear": per cent, "few": per cent}.

        knn: the accuracies of this encoder, if they are known already.
        """
        if knn is not None and not self.config.linear_probe and not self.config.few_labels:
            return knn
        return self._scores(encoder.backbone, encoder.precision(self.device))

    def raw_bytes(self) -> int:
        """An upper bound on the bytes of `raw_scores` as f32 over all ranks, from the first batch of each set."""
        firsts = _on_all_ranks(lambda: [(next(iter(loader), None), len(loader)) for loader in (self.train, self.test)])
        total = sum(4 * first[0].numel() * batches for first, batches in firsts if first is not None)
        return int(all_reduce_sum(torch.tensor([total], device=self.device)))

    def raw_scores(self) -> dict[str, float]:
        """The scores of pixel values in [0, 1]: the accuracy that the data give without an encoder."""
        return self._scores(_Pixels(self.denormalise), None)

    def _scores(self, module: nn.Module, precision: AbstractContextManager | None) -> dict[str, float]:
        train, test = self._extract(module, precision)
        scores = self._knn(train, test)
        if self.config.linear_probe:
            scores["linear"] = linear_probe(*train[:2], *test[:2], classes=self.classes, train_index=train[2])
        if self.config.few_labels:
            options = dict(classes=self.classes, per_class=self.config.few_labels, key="evaluation.few_labels")
            draws = few_labels(*train[:2], *test[:2], train_index=train[2], **options)
            scores["few"] = mean(found["top1"] for found in draws)
        return scores

    def _extract(self, module: nn.Module, precision: AbstractContextManager | None) -> tuple[tuple[Tensor, ...], ...]:
        """(features [N, D], labels [N], index [N]) of the training share and of the test set."""
        self._require_images()
        sets = (self.train, self.test)
        return _on_all_ranks(lambda: tuple(extract_features(module, loader, self.device, precision) for loader in sets))

    def _require_images(self) -> None:
        """Raise on all ranks alike, because a rank that raised alone would leave the others waiting."""
        for name, loader in (("training", self.train), ("test", self.test)):
            batches = all_gather_objects(len(loader))
            if min(batches) == 0:
                raise UserError(
                    f"evaluation: found {batches} batches of {name} images on the ranks, expected at least one on every"
                    " rank; use fewer ranks or more images"
                )

    def _knn(self, train: tuple[Tensor, ...], test: tuple[Tensor, ...]) -> dict[str, float]:
        features, labels, index = train
        accuracy = knn_accuracy(
            features,
            labels,
            test[0],
            test[1],
            k=list(self.config.k),
            classes=self.classes,
            temperature=self.config.temperature,
            train_index=index,
        )
        return {f"knn_{k}": score for k, score in accuracy.items()}


def _on_all_ranks(work: Callable[[], Result]) -> Result:
    """The result of `work`. A UserError of any rank is raised on all of them (collective).

    A rank that raised alone, for images of its own share, would leave the others waiting.
    """
    result, reason = None, ""
    try:
        result = work()
    except UserError as error:
        reason = str(error)
    for found in all_gather_objects(reason):
        if found:
            raise UserError(found)
    return result  # type: ignore[return-value]
