"""Logistic regression on frozen features of the evaluation's own images, without augmentation, as DINOv2 and CLIP do.

It is what `transfer` does with another set, at the image size of the evaluation.
"""

from dataclasses import dataclass

from caco_fast.errors import UserError
from caco_fast.protocols.base import Context, Result, register
from caco_fast.protocols.images import labelled
from caco_fast.protocols.penalty_search import Score, choose_and_test, penalties
from caco_fast.settings import require_at_least, setting


@dataclass(frozen=True)
class LogisticConfig:
    lambdas: int = setting(45, "values of the penalty to try, from 1e5 to 1e-6 in equal ratios")
    held_out: float = setting(0.1, "share of the training images to choose the penalty on; DINOv2 takes 0.1")

    def __post_init__(self) -> None:
        require_at_least("logistic.lambdas", self.lambdas, 2)
        if not 0 < self.held_out < 1:
            raise UserError(f"logistic.held_out: found {self.held_out}, expected a share between 0 and 1")


@register("logistic", LogisticConfig, "logistic regression on frozen features, without augmentation")
def logistic(context: Context, settings: LogisticConfig) -> Result:
    train, test = labelled(context, "logistic")
    figures, tried, error = choose_and_test(
        Score("top1", len(train.classes)),
        context.features("train", source=train),
        None,
        context.features("test", source=test),
        penalties(settings.lambdas),
        settings.held_out,
        "top1",
        key="logistic",
        device=context.device,
    )
    counts = {"images": {"train": {"found": len(train)}, "test": {"found": len(test)}}}
    return Result(figures, standard_error=error, sweep=tried, counts=counts)
