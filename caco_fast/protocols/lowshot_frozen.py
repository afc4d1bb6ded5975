"""Logistic regression on the frozen features of a few labelled images of each class, over several draws."""

import statistics
from dataclasses import dataclass

from caco_fast.errors import UserError
from caco_fast.evaluate.few_labels import few_labels
from caco_fast.protocols.base import Context, Result, register
from caco_fast.settings import require_at_least, setting


@dataclass(frozen=True)
class LowshotFrozenConfig:
    per_class: list[int] = setting([10, 100], "labelled images of each class; the first number is the headline")
    seeds: int = setting(5, "draws of these images, over which mean and deviation are taken")
    folds: int = setting(5, "folds of the cross-validation that chooses the penalty by cross-entropy")

    def __post_init__(self) -> None:
        if not self.per_class or min(self.per_class) < 2 or len(set(self.per_class)) < len(self.per_class):
            raise UserError(
                f"lowshot_frozen.per_class: found {list(self.per_class)}, expected numbers of at least 2, each once"
            )
        require_at_least("lowshot_frozen.seeds", self.seeds, 1)
        require_at_least("lowshot_frozen.folds", self.folds, 2)


@register("lowshot_frozen", LowshotFrozenConfig, "logistic regression on frozen features of a few labelled images")
def lowshot_frozen(context: Context, settings: LowshotFrozenConfig) -> Result:
    train, test = context.features("train"), context.features("test")
    result = Result({})
    for count in settings.per_class:
        draws = few_labels(
            train.features.to(context.device),
            train.labels,
            test.features.to(context.device),
            test.labels,
            classes=len(train.source.classes),
            per_class=count,
            seeds=settings.seeds,
            first_seed=context.seed,
            folds=settings.folds,
            train_index=train.index,
            key="lowshot_frozen.per_class",
        )
        result.sweep += [{"per_class": count, **found} for found in draws]
        top1 = [found["top1"] for found in draws]
        result.metrics[f"top1_{count}_per_class"] = statistics.mean(top1)
        if len(top1) > 1:
            result.metrics[f"top1_{count}_per_class_deviation"] = statistics.stdev(top1)
    return result
