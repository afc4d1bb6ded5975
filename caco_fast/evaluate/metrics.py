"""Figures of a classifier: accuracies, and the three average precisions that papers print for VOC2007.

Legend: N images, K classes; relevance [N, K] is 1 for an object of that class, -1 for none, 0 for one to leave out.
"""

import math

import torch
from torch import Tensor


def top_k(scores: Tensor, labels: Tensor, k: int) -> float:
    """Per cent of rows [N, K] whose label [N] is among the k highest scores. Equal scores count by the lower class."""
    own = scores.gather(1, labels.unsqueeze(1))
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (classes < labels.unsqueeze(1)))
    return 100.0 * (before.sum(1) < k).double().mean().item()


def mean_per_class(predicted: Tensor, labels: Tensor) -> float:
    """The mean of the accuracies of the classes that have an image, in per cent."""
    counts = torch.bincount(labels)
    right = torch.bincount(labels[predicted == labels], minlength=len(counts))
    return 100.0 * (right[counts > 0].double() / counts[counts > 0]).mean().item()


def standard_error(per_cent: float, count: int) -> float:
    """How far an accuracy may be off by the choice of `count` images alone: its standard deviation, in per cent."""
    share = per_cent / 100
    return 100.0 * math.sqrt(max(share * (1 - share), 0.0) / max(count, 1))


def standard_error_per_class(predicted: Tensor, labels: Tensor) -> float:
    """The same for `mean_per_class`."""
    counts = torch.bincount(labels)
    right = torch.bincount(labels[predicted == labels], minlength=len(counts))
    share = right[counts > 0].double() / counts[counts > 0]
    variance = (share * (1 - share) / counts[counts > 0]).sum() / len(share) ** 2
    return 100.0 * math.sqrt(variance.item())


def precision_recall(scores: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall [M] after each distinct score, from the highest on; empty without an image to find.

    Images with equal scores are counted together, because no order among them means anything.
    """
    counted = relevance != 0
    scores, found = scores[counted].double(), (relevance[counted] > 0).double()
    order = scores.argsort(descending=True, stable=True)
    scores, found = scores[order], found[order]
    if len(found) == 0 or found.sum() == 0:
        return scores.new_empty(0), scores.new_empty(0)
    hits = found.cumsum(0)
    seen = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
    return (hits / seen)[last], (hits / hits[-1])[last]


def area_ap(scores: Tensor, relevance: Tensor) -> float:
    """The area under the precision-recall curve, precision made monotone (VISSL's AP); NaN: nothing to find."""
    precision, recall = precision_recall(scores, relevance)
    if not len(recall):
        return math.nan
    precision = precision.flip(0).cummax(0).values.flip(0)
    return 100.0 * (torch.diff(recall, prepend=recall.new_zeros(1)) * precision).sum().item()


def eleven_point_ap(scores: Tensor, relevance: Tensor) -> float:
    """The mean of the best precision at recall of at least 0, 0.1, ... 1 (VOC2007's devkit); NaN: nothing to find."""
    precision, recall = precision_recall(scores, relevance)
    if not len(recall):
        return math.nan
    # A recall such as 3 / 10 counts as at least 0.3.
    best = [precision[recall >= point / 10 - 1e-12] for point in range(11)]
    return 100.0 * sum(part.max().item() if len(part) else 0.0 for part in best) / 11


def mean_ap(scores: Tensor, relevance: Tensor, *, eleven_points: bool) -> float:
    """The mean over the classes with something to find of one of the two."""
    ap = eleven_point_ap if eleven_points else area_ap
    found = [ap(scores[:, label], relevance[:, label]) for label in range(scores.shape[1])]
    kept = [value for value in found if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def image_ap(scores: Tensor, relevance: Tensor) -> float:
    """The mean over images of the average precision with which an image ranks its own classes.

    It is what AdCo's VOC script prints, and by its level what CaCo's table has. It is no mAP, and much higher.
    """
    values = []
    for row, wanted in zip(scores, relevance):
        precision, recall = precision_recall(row, wanted)
        if len(recall):
            values.append((torch.diff(recall, prepend=recall.new_zeros(1)) * precision).sum().item())
    return 100.0 * sum(values) / len(values) if values else math.nan
