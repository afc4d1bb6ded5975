"""Weighted k nearest neighbours by cosine similarity (Wu et al., arXiv 1805.01978), with any k and temperatures."""

from dataclasses import dataclass

from caco_fast.errors import UserError
from caco_fast.evaluate import knn_scores
from caco_fast.protocols.base import Context, Result, register
from caco_fast.settings import setting


@dataclass(frozen=True)
class KnnConfig:
    k: list[int] = setting([200, 20], "numbers of neighbours that vote; the first one is the headline")
    temperatures: list[float] = setting(
        [0.2], "temperatures of the votes: CaCo and SimSiam 0.2, InstDisc and lightly 0.1, DINO 0.07"
    )

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise UserError(f"knn.k: found {list(self.k)}, expected numbers of at least 1")
        for name, values in (("k", self.k), ("temperatures", self.temperatures)):
            if len(set(values)) < len(values):
                raise UserError(f"knn.{name}: found {list(values)}, expected every number once")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise UserError(f"knn.temperatures: found {list(self.temperatures)}, expected positive numbers")


@register("knn", KnnConfig, "weighted nearest neighbours, without training")
def knn(context: Context, settings: KnnConfig) -> Result:
    train, test = context.features("train"), context.features("test")
    scores = knn_scores(
        train.features.to(context.device),
        train.labels,
        test.features.to(context.device),
        test.labels,
        k=settings.k,
        classes=len(train.source.classes),
        temperatures=settings.temperatures,
        train_index=train.index,
    )
    metrics, sweep = {}, []
    for temperature in settings.temperatures:
        for k in settings.k:
            top1, top5 = scores[k, temperature]
            metrics[f"top1_k{k}_t{temperature:g}"] = top1
            metrics[f"top5_k{k}_t{temperature:g}"] = top5
            sweep.append({"k": k, "temperature": temperature, "top1": top1, "top5": top5})
    return Result(metrics, sweep=sweep)
