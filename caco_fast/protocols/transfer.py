"""Linear classification of other sets on frozen features (Kornblith et al., CVPR 2019; CaCo paper, Table V).

Multinomial logistic regression on features as they are, without augmentation. The penalty lambda |W|^2 / 2 is added to
the sum of the losses. Its lambda is the best of 45 on the validation images. A last fit takes these too, and is scored
once.

Legend: N images of this rank, K classes.
"""

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from caco_fast.data import DataConfig, Source
from caco_fast.data.sources.base import IMAGENET_MEAN, IMAGENET_STD
from caco_fast.data.transfer import TRANSFER_SETS, TransferSet, VocSource, open_set
from caco_fast.engine.agreement import together
from caco_fast.errors import UserError
from caco_fast.protocols.base import Context, FeatureSet, Published, Result, register
from caco_fast.protocols.penalty_search import Score, choose_and_test, penalties
from caco_fast.protocols.resuming import Resumable
from caco_fast.settings import require_at_least, setting

log = logging.getLogger("caco_fast.evaluation")

# Those of the paper's table, in its order.
PAPER = (
    "sun397",
    "cars",
    "food101",
    "aircraft",
    "voc2007",
    "dtd",
    "pets",
    "caltech101",
    "flowers102",
    "cifar10",
    "cifar100",
)
# Table V of the CaCo paper, ResNet-50, with the kind of VOC's number: BYOL's is an 11-point mAP, and those of AdCo and
# CaCo fit the average over images of AdCo's script. MoCo's, left out, is at the level of VISSL's SVM.
TABLE = {
    "CaCo": ((64.6, 73.8, 75.4, 66.0, 92.6, 76.8, 91.9, 94.4, 96.1, 92.6, 76.0), "voc2007_ap_over_images"),
    "AdCo": ((62.2, 66.8, 73.8, 63.6, 92.4, 75.5, 86.8, 91.8, 93.7, 91.2, 74.3), "voc2007_ap_over_images"),
    "BYOL": ((62.2, 67.8, 75.3, 60.6, 82.5, 75.5, 90.4, 94.2, 96.1, 91.3, 78.4), "voc2007"),
}
# No list of the training images of Caltech-101 was published, so the figure is a mean over splits.
CALTECH_SPLITS = 5


@dataclass(frozen=True)
class TransferConfig:
    sets: list[str] = setting(
        ["all"], f"sets of images: {', '.join(TRANSFER_SETS)}, folder:PATH, or all: the eleven of the paper's Table V"
    )
    root: str = setting("", "folder that holds the released folders, such as food-101/")
    size: int = setting(224, "pixels of the shorter side, resized by bicubic interpolation, and of the centre crop")
    lambdas: int = setting(45, "values of the penalty to try, from 1e-6 to 1e5 in equal ratios")
    held_out: float = setting(
        0.2, "share of the training images to choose on, where no validation images were released"
    )

    def __post_init__(self) -> None:
        for name in self.sets:
            if name != "all" and not name.startswith("folder:") and name not in TRANSFER_SETS:
                raise UserError(
                    f"transfer.sets: found '{name}', expected all, {', '.join(TRANSFER_SETS)} or folder:PATH"
                )
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"transfer.sets: found {list(self.sets)}, expected one or more sets, each once")
        require_at_least("transfer.size", self.size, 1)
        require_at_least("transfer.lambdas", self.lambdas, 2)
        if not 0 < self.held_out < 1:
            raise UserError(f"transfer.held_out: found {self.held_out}, expected a share between 0 and 1")

    @property
    def names(self) -> list[str]:
        return [each for name in self.sets for each in (PAPER if name == "all" else (name,))]

    def penalties(self) -> list[float]:
        """lambda, from strong to weak."""
        return penalties(self.lambdas)


@register("transfer", TransferConfig, "logistic regression on frozen features of other sets of images")
def transfer(context: Context, settings: TransferConfig) -> Result:
    splits = together(lambda: {name: _splits(name, settings.root) for name in settings.names})
    key = dataclasses.asdict(settings) | {
        "weights": context.pretrained.weights_sha256,
        "autocast": str(context.autocast),
        "images": {name: [found.train.list_hash() for found in sets] for name, sets in splits.items()},
    }
    resumable = Resumable("transfer", context.folder, key)
    done: dict[str, Any] = resumable.load() or {}
    for name, sets in splits.items():
        if name not in done:
            done[name] = _of_set(context, settings, name, sets)
            resumable.save(done, now=True)
    resumable.finished()
    result = Result({}, counts={name: sets[0].counts for name, sets in splits.items()})
    for found in done.values():
        result.metrics |= found["metrics"]
        result.sweep += found["sweep"]
        result.notes += found["notes"]
    result.standard_error = done[settings.names[0]]["standard_error"]
    if context.pretrained.architecture.name == "resnet50":
        result.published = [
            Published(who, values[PAPER.index(name)], "CaCo paper, Table V", voc if name == "voc2007" else name)
            for name in settings.names
            if name in PAPER
            for who, (values, voc) in TABLE.items()
        ]
    if settings.size != 224:
        result.deviations["transfer.size"] = {"found": settings.size, "preset": 224}
    if settings.lambdas != 45:
        result.deviations["transfer.lambdas"] = {"found": settings.lambdas, "preset": 45}
    return result


def _splits(name: str, root: str) -> list[TransferSet]:
    return [open_set(name, root, seed) for seed in range(CALTECH_SPLITS if name == "caltech101" else 1)]


def _of_set(context: Context, settings: TransferConfig, name: str, sets: Sequence[TransferSet]) -> dict[str, Any]:
    """The figures of a set over its splits, with the penalties that were tried."""
    notes = [
        f"{name}: found {count['found']} {split} images, published are {count['published']}"
        for split, count in sets[0].counts.items()
        if count["published"] not in (None, count["found"])
    ]
    for line in notes:
        log.warning("transfer: %s", line)
    several, sweep, error = [], [], None
    for seed, found in enumerate(sets):
        figures, tried, error = _fit(context, settings, name, found)
        several.append(figures)
        sweep += [{"set": name, "split": seed, **row} for row in tried]
    figures = {key: statistics.mean(each[key] for each in several) for key in several[0]}
    if len(several) > 1:
        error = statistics.stdev(each[name] for each in several)
        notes.append(f"{name}: mean over {len(several)} random splits, whose standard deviation is {error:.2f}")
    log.info("transfer: %s %s %.2f", name, sets[0].metric.replace("_", " "), figures[name])
    return {"metrics": figures, "sweep": sweep, "notes": notes, "standard_error": error}


def _fit(
    context: Context, settings: TransferConfig, name: str, found: TransferSet
) -> tuple[dict[str, float], list[dict[str, Any]], float]:
    """The figures on the test images, the penalties tried, and the standard error of the first figure (collective)."""
    data = _view(context, settings)
    train, test = (_labelled(context, data, split, getattr(found, split)) for split in ("train", "test"))
    val = None if found.val is None else _labelled(context, data, "validation", found.val)
    score = Score(found.metric, len(found.train.classes))
    return choose_and_test(
        score,
        train,
        val,
        test,
        settings.penalties(),
        settings.held_out,
        name,
        key=f"transfer: {name}",
        device=context.device,
    )


def _view(context: Context, settings: TransferConfig) -> DataConfig:
    """How the images of all sets are read: by the protocol, and normalised as the backbone was trained."""
    pretrained, data, size = context.pretrained, context.data, settings.size
    mean, std = data.mean or pretrained.mean, data.std or pretrained.std
    if pretrained.channels == 3:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    return dataclasses.replace(
        data,
        mean=list(mean) if mean else None,
        std=list(std) if std else None,
        eval_resize=size,
        eval_size=size,
        eval_interpolation="bicubic",
    )


def _labelled(context: Context, data: DataConfig, split: str, source: Source) -> FeatureSet:
    """Features, and labels [N], or [N, K] of 1, 0 and -1 for a set with several labels an image."""
    found = context.features(split, data=data, source=source, labelled=not isinstance(source, VocSource))
    if not isinstance(source, VocSource):
        return found
    return found._replace(labels=torch.from_numpy(source.targets[found.index.numpy()]).to(torch.int64))
