"""Weighted k-nearest-neighbour accuracy by cosine similarity, exact with several ranks (Wu et al., arXiv 1805.01978).

Legend: N training rows of this rank, M test rows of all ranks, D feature size, Q test rows of a tile.
"""

import logging
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.distributed import (
    all_gather_rows,
    all_gather_uneven,
    all_reduce_sum,
    is_distributed,
    rank,
    world_size,
)
from caco_fast.errors import UserError
from caco_fast.ops.tiling import f32_products

# A product has QUERIES x ROWS similarities. Of up to PRODUCTS of them next to each other the largest are taken at a
# time, because a search in long rows is cheaper. Where many are equal, keys take some 30 bytes for each.
QUERIES, ROWS, PRODUCTS = 512, 8192, 8
# Values of the scaled rows that are kept for these products, 256 MiB.
UNITS = 2**26
# Columns that are searched by the largest of them first.
GROUP = 8
# A key below that of any similarity. It fills the places of a rank that has fewer rows than k.
NO_KEY = torch.iinfo(torch.int64).min

log = logging.getLogger(__name__)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int | Sequence[int],
    classes: int,
    temperature: float = 0.2,
    train_index: Tensor | None = None,
) -> dict[int, float]:
    """Per cent of test rows whose label wins the vote of the k nearest training rows, each weighted exp(cosine / t).

    See `knn_scores`, which takes several temperatures.
    """
    found = knn_scores(
        train_features,
        train_labels,
        test_features,
        test_labels,
        k=[k] if isinstance(k, int) else k,
        classes=classes,
        temperatures=[temperature],
        train_index=train_index,
    )
    return {each: top1 for (each, _), (top1, _) in found.items()}


@f32_products()
@torch.no_grad()
def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int],
    classes: int,
    temperatures: Sequence[float],
    train_index: Tensor | None = None,
) -> dict[tuple[int, float], tuple[float, float]]:
    """Per cent of test rows whose label is the first, and among the first five, in the vote of the nearest rows.

    Each of the k nearest training rows has a vote of exp(cosine / t). The result has a pair (top-1, top-5) for each k
    and t; the search is done once for all of them.

    Each rank gives its own shard of both sets, of any size. All ranks return the same figures, which are those of one
    process with all rows. Equal similarities go to the lower `train_index` (the dataset index, by default the place in
    rank order), and equal votes to the lower class; so do classes without a vote. A k larger than the training set is
    clamped, with a warning; its result is still under the given k.
    """
    if not k or min(k) < 1:
        raise ValueError(f"k: found {list(k)}, expected numbers of at least 1")
    shards = all_gather_rows(torch.tensor([len(train_features)], device=train_features.device)).tolist()
    total = sum(shards)
    queries = all_gather_uneven(_unit(test_features))  # [M, D]
    answers = all_gather_uneven(test_labels.to(test_features.device, torch.int64))  # [M]
    if total == 0 or len(queries) == 0:
        raise UserError(f"kNN: found {total} training and {len(queries)} test images, expected at least 1 of each")
    if max(k) > total and rank() == 0:
        log.warning("kNN: k %d is larger than the training set, %d neighbours vote", max(k), total)
    _require_finite(train_features, queries)
    device = train_features.device
    if train_index is None:
        train_index = sum(shards[: rank()]) + torch.arange(len(train_features))
    train_index, labels = train_index.to(device, torch.int64), train_labels.to(device, torch.int64)
    neighbours = _neighbours(queries, train_features, labels, train_index, min(max(k), total))

    correct = {(each, t): [0, 0] for each in k for t in temperatures}
    for (similarity, label), answer in zip(neighbours, answers.cpu().split(QUERIES), strict=True):
        # On the CPU, because the order of a sum is fixed there.
        similarity, label = similarity.cpu().double(), label.cpu()
        for t in temperatures:
            weight = (similarity / t).exp()  # [Q, most]
            for each in k:
                votes = weight.new_zeros(len(answer), classes)
                votes.scatter_add_(1, label[:, :each], weight[:, :each])
                place = _place(votes, answer)
                correct[each, t][0] += int((place < 1).sum())
                correct[each, t][1] += int((place < 5).sum())
    return {key: (100.0 * top1 / len(queries), 100.0 * top5 / len(queries)) for key, (top1, top5) in correct.items()}


def _place(votes: Tensor, answer: Tensor) -> Tensor:  # [Q, classes], [Q] -> [Q]
    """The number of classes that are before the right one; equal votes are in the order of the classes."""
    classes = votes.shape[1]
    label = answer.clamp(0, classes - 1).unsqueeze(1)
    own = votes.gather(1, label)
    before = (votes > own).sum(1) + ((votes == own) & (torch.arange(classes) < label)).sum(1)
    # A label that the training set does not have is never found.
    return before.masked_fill((answer < 0) | (answer >= classes), classes + 5)


def _neighbours(
    queries: Tensor, features: Tensor, labels: Tensor, index: Tensor, k: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities and labels [Q, k] of the nearest rows over all ranks, nearest first, for each tile of the queries.

    Rows are scaled to unit length block by block, because a scaled copy of them all would double the memory.
    """
    tiles = queries.split(QUERIES)
    none = labels.new_empty(0)
    best = [(none.expand(len(tile), 0), none.expand(len(tile), 0)) for tile in tiles]
    products = max(1, min(PRODUCTS, UNITS // (ROWS * max(1, queries.shape[1]))))
    width = min(products * ROWS, len(features))
    similarity = queries.new_empty(min(QUERIES, len(queries)), width)
    # In memory that is used again: pages that the system hands out anew cost as much as the division.
    units = queries.new_empty(width, queries.shape[1])
    for start in range(0, len(features), max(1, width)):
        rows = slice(start, start + width)
        count = len(features[rows])
        for part, unit in zip(features[rows].split(ROWS), units.split(ROWS)):
            _unit(part, out=unit[: len(part)])
        for number, (tile, (keys, label)) in enumerate(zip(tiles, best)):
            tile_similarity = similarity[: len(tile), :count]
            for part, columns in zip(units[:count].split(ROWS), tile_similarity.split(ROWS, dim=1)):
                torch.mm(tile, part.T, out=columns)
            # Rows below the present k-th are of no use.
            least = _similarity(keys[:, -1:]) if keys.shape[1] == k else None
            found, place = _nearest(tile_similarity, index[rows], k, least)
            best[number] = _best(torch.cat([keys, found], 1), torch.cat([label, labels[rows][place]], 1), k)
    for keys, label in best:
        if is_distributed():
            missing = (0, k - keys.shape[1])
            keys, label = F.pad(keys, missing, value=NO_KEY), F.pad(label, missing)
            keys, label = _best(_columns_of_all_ranks(keys), _columns_of_all_ranks(label), k)
        yield _similarity(keys), label


def _unit(rows: Tensor, out: Tensor | None = None) -> Tensor:  # [n, D] -> [n, D] f32
    return F.normalize(rows.float(), dim=1, out=out)


def _nearest(similarity: Tensor, index: Tensor, k: int, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and columns of the k largest similarities [Q, n] of each row, in any order; n if there are no more.

    least [Q, 1]: no row needs a similarity below it, so that there may be fewer than k.
    """
    if k >= similarity.shape[1]:
        place = torch.arange(similarity.shape[1], device=index.device).expand_as(similarity)
        return _sortable(similarity, index), place
    values, place = _candidates(similarity, k + 1, least)
    if values.shape[1] <= k:
        return _sortable(values, index[place]), place
    # One more than k tells in which rows the choice is among equal similarities. Only they need a key for every column.
    values, chosen = values.topk(k + 1, dim=1)
    tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
    place = place.gather(1, chosen[:, :k])
    keys = _sortable(values[:, :k], index[place])
    if len(tied):
        keys[tied], place[tied] = _sortable(similarity[tied], index).topk(k, dim=1)
    return keys, place


def _candidates(similarity: Tensor, k: int, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values and columns among which are the k largest similarities [Q, n] of each row, or all that reach `least`.

    The columns are in groups. The k groups with the largest maxima hold the k largest values: a larger value in
    another group would make its maximum larger, too. So most columns are read once, for their maximum.
    """
    groups = similarity.shape[1] // GROUP
    if k >= groups:
        return similarity, torch.arange(similarity.shape[1], device=similarity.device).expand_as(similarity)
    # Group j is of the columns j, j + groups, ..., so that maxima are taken over whole rows of values.
    tops = similarity[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1)
    if least is not None:
        k = min(k, max(1, int((tops >= least).sum(1).max())))
    chosen = tops.topk(k, dim=1, sorted=False).indices
    steps = torch.arange(0, groups * GROUP, groups, device=similarity.device)
    columns = (chosen.unsqueeze(1) + steps.view(1, -1, 1)).flatten(1)
    rest = torch.arange(groups * GROUP, similarity.shape[1], device=similarity.device)
    columns = torch.cat([columns, rest.expand(len(similarity), -1)], 1)
    return similarity.gather(1, columns), columns


def _columns_of_all_ranks(rows: Tensor) -> Tensor:
    """The columns [Q, k] of every rank next to each other, [Q, ranks k]."""
    return all_gather_rows(rows).unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(1)


def _best(keys: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    keys, place = keys.topk(min(k, keys.shape[1]), dim=1)
    return keys, labels.gather(1, place)


def _sortable(similarity: Tensor, index: Tensor) -> Tensor:
    """One int64 for each similarity and row index, ordered by (similarity, -index). All differ, so top-k is exact.

    The bits of floats have the order of integers once those of negative floats are flipped. Adding 0 turns -0 into 0.
    """
    bits = (similarity + 0.0).contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - index)


def _similarity(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _require_finite(features: Tensor, queries: Tensor) -> None:
    """Raise on all ranks alike, because a rank that raised alone would leave the others waiting."""
    bad = torch.zeros((), dtype=torch.int64, device=features.device)
    for part in features.split(ROWS):
        # The largest magnitude is infinite or NaN if any value is.
        bad += (~torch.linalg.vector_norm(part, torch.inf, dim=1).isfinite()).sum()
    bad = all_reduce_sum(bad) + (~queries.isfinite().all(1)).sum()
    if bad:
        raise UserError(f"kNN: {int(bad)} images have features that are NaN or infinite, the encoder has diverged")
