"""One-vs-rest SVMs on frozen features of PASCAL VOC2007, as VISSL trains them (Goyal et al., arXiv 1905.01235).

C is chosen for each class by cross-validation on the average precision. The figure is the mean over the classes of the
area under the precision-recall curve, and not the 11-point mAP that `transfer` gives.

Legend: N images of this rank, K classes, A problems.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.data import DataConfig, Source
from caco_fast.data.transfer import VocSource, open_set
from caco_fast.distributed import all_gather_uneven
from caco_fast.engine.agreement import together
from caco_fast.errors import UserError
from caco_fast.evaluate import metrics
from caco_fast.evaluate.rows import Rows, coordinates, places, require_finite
from caco_fast.evaluate.solvers import Columns, scores_of_all, squared_hinge
from caco_fast.protocols.base import Context, Published, Result, register
from caco_fast.settings import require_at_least, setting

COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Voc07SvmConfig:
    root: str = setting("", "folder that holds VOCdevkit/VOC2007")
    costs: list[float] = setting(list(COSTS), "values of C to try")
    folds: int = setting(3, "folds of the cross-validation")
    resize: int = setting(256, "pixels of the shorter side")
    size: int = setting(224, "pixels of the centre crop")

    def __post_init__(self) -> None:
        if not self.costs or min(self.costs) <= 0:
            raise UserError(f"voc07_svm.costs: found {list(self.costs)}, expected numbers above 0")
        for name, least in (("folds", 2), ("resize", 1), ("size", 1)):
            require_at_least(f"voc07_svm.{name}", getattr(self, name), least)


@register("voc07_svm", Voc07SvmConfig, "linear SVMs on frozen features of PASCAL VOC2007")
def voc07_svm(context: Context, settings: Voc07SvmConfig) -> Result:
    found = together(lambda: open_set("voc2007", settings.root, key="voc07_svm.root"))
    data = replace(context.data, eval_resize=settings.resize, eval_size=settings.size)
    parts = {split: getattr(found, split) for split in ("train", "val", "test")}
    features, targets = {}, {}
    for split, source in parts.items():
        features[split], targets[split] = _unit_features(context, data, split, source)
    x, y = (torch.cat([part["train"], part["val"]]) for part in (features, targets))
    classes = y.shape[1]
    require_finite("voc07_svm", x, features["test"])
    # The bias is penalised, so the features stay where they are.
    rows = Rows(x, y, coordinates(x, centre=False), x.dtype).ready()
    folds = places(len(x), None, x.device) % settings.folds
    grid = [
        (label, cost, fold) for label in range(classes) for cost in settings.costs for fold in range(settings.folds)
    ]
    weight, converged = squared_hinge(rows, _columns(grid, x.device), folds)
    (every, answers), fold_of = scores_of_all(rows, weight), all_gather_uneven(folds)
    tried: dict[tuple[int, float], list[float]] = {}
    for column, (label, cost, fold) in enumerate(grid):
        out = fold_of == fold
        tried.setdefault((label, cost), []).append(metrics.area_ap(every[out, column], answers[out, label]))
    # Not a number where a fold has nothing to find.
    means = {key: float(torch.tensor(values).nanmean()) for key, values in tried.items()}
    chosen = [max(settings.costs, key=lambda cost: _known(means[label, cost])) for label in range(classes)]
    last, fitted = squared_hinge(rows, _columns([(n, cost, -1) for n, cost in enumerate(chosen)], x.device), folds)
    test = Rows(features["test"], targets["test"], rows.at, x.dtype)
    predicted, answers = scores_of_all(test, last)
    result = Result({"map": metrics.mean_ap(predicted, answers, eleven_points=False)})
    result.metrics["map_11_points"] = metrics.mean_ap(predicted, answers, eleven_points=True)
    names = found.train.classes
    result.sweep = [
        {"class": names[label], "C": cost, "validation": value, "chosen": cost == chosen[label]}
        for (label, cost), value in means.items()
    ]
    result.counts = {"voc2007": found.counts}
    if left := int((~converged).sum()) + int((~fitted).sum()):
        result.notes.append(f"{left} of {len(converged) + len(fitted)} SVMs stopped before they had converged")
    result.deviations = {
        f"voc07_svm.{name}": {"found": getattr(settings, name), "preset": preset}
        for name, preset in (("costs", list(COSTS)), ("folds", 3), ("resize", 256), ("size", 224))
        if getattr(settings, name) != preset
    }
    if context.pretrained.architecture.name == "resnet50":
        result.published = [
            Published("SwAV", 88.9, "SwAV paper"),
            Published("Barlow Twins", 86.2, "Barlow Twins paper"),
        ]
    return result


def _known(value: float) -> float:
    return value if value == value else -1.0


def _unit_features(context: Context, data: DataConfig, split: str, source: Source) -> tuple[Tensor, Tensor]:
    """Features of unit length, [N, D] on the device, and the targets [N, K] of 1, 0 and -1 (collective)."""
    found = context.features(split, data=data, source=source, labelled=False)
    assert isinstance(source, VocSource)
    dtype = torch.float64 if context.device.type == "cpu" else torch.float32
    targets = torch.from_numpy(source.targets[found.index.numpy()]).to(context.device, torch.int64)
    return F.normalize(found.features.to(context.device, dtype), dim=1), targets


def _columns(problems: list[tuple[int, float, int]], device: torch.device) -> Columns:
    label, cost, fold = zip(*problems)
    made = Columns(torch.tensor(label), torch.tensor(cost, dtype=torch.float64), torch.tensor(fold))
    return Columns(*(value.to(device) for value in made))
