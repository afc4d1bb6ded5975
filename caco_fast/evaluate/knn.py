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

# A product has QUERIES x ROWS similarities. Of PRODUCTS of them next to each other the largest are taken at a time,
# because a search in long rows is cheaper. Where many are equal, keys take some 30 bytes for each.
QUERIES, ROWS, PRODUCTS = 1024, 8192, 4
# A key below that of any similarity. It fills the places of a rank that has fewer rows than k.
NO_KEY = torch.iinfo(torch.int64).min

log = logging.getLogger(__name__)


@f32_products()
@torch.no_grad()
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

    Each rank gives its own shard of both sets, of any size. All ranks return the same figures, which are those of one
    process with all rows. Equal similarities go to the lower `train_index` (the dataset index, by default the place in
    rank order), and equal votes to the lower class. A k larger than the training set is clamped, with a warning; its
    result is still under the given k.
    """
    ks = [k] if isinstance(k, int) else list(k)
    if not ks or min(ks) < 1:
        raise ValueError(f"k: found {ks}, expected numbers of at least 1")
    shards = all_gather_rows(torch.tensor([len(train_features)], device=train_features.device)).tolist()
    total = sum(shards)
    queries = all_gather_uneven(_unit(test_features))  # [M, D]
    answers = all_gather_uneven(test_labels.to(test_features.device, torch.int64))  # [M]
    if total == 0 or len(queries) == 0:
        raise UserError(f"kNN: found {total} training and {len(queries)} test images, expected at least 1 of each")
    if max(ks) > total and rank() == 0:
        log.warning("kNN: k %d is larger than the training set, %d neighbours vote", max(ks), total)
    _require_finite(train_features, queries)
    device = train_features.device
    if train_index is None:
        train_index = sum(shards[: rank()]) + torch.arange(len(train_features))
    train_index, labels = train_index.to(device, torch.int64), train_labels.to(device, torch.int64)
    neighbours = _neighbours(queries, train_features, labels, train_index, min(max(ks), total))

    correct = dict.fromkeys(ks, 0)
    for (similarity, label), answer in zip(neighbours, answers.cpu().split(QUERIES), strict=True):
        # On the CPU, because the order of a sum is fixed there.
        weight = (similarity.cpu().double() / temperature).exp()  # [Q, most]
        for each in ks:
            votes = weight.new_zeros(len(answer), classes)
            votes.scatter_add_(1, label[:, :each].cpu(), weight[:, :each])
            correct[each] += int((votes.argmax(1) == answer).sum())
    return {each: 100.0 * correct[each] / len(queries) for each in ks}


def _neighbours(
    queries: Tensor, features: Tensor, labels: Tensor, index: Tensor, k: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities and labels [Q, k] of the nearest rows over all ranks, nearest first, for each tile of the queries.

    Rows are scaled to unit length block by block, because a scaled copy of them all would double the memory.
    """
    tiles = queries.split(QUERIES)
    none = labels.new_empty(0)
    best = [(none.expand(len(tile), 0), none.expand(len(tile), 0)) for tile in tiles]
    width = PRODUCTS * ROWS
    similarity = queries.new_empty(min(QUERIES, len(queries)), min(width, len(features)))
    for start in range(0, len(features), width):
        rows = slice(start, start + width)
        parts = [_unit(part) for part in features[rows].split(ROWS)]
        for number, (tile, (keys, label)) in enumerate(zip(tiles, best)):
            products = similarity[: len(tile), : len(features[rows])]
            for part, columns in zip(parts, products.split(ROWS, dim=1)):
                torch.mm(tile, part.T, out=columns)
            found, place = _nearest(products, index[rows], k)
            best[number] = _best(torch.cat([keys, found], 1), torch.cat([label, labels[rows][place]], 1), k)
    for keys, label in best:
        if is_distributed():
            missing = (0, k - keys.shape[1])
            keys, label = F.pad(keys, missing, value=NO_KEY), F.pad(label, missing)
            keys, label = _best(_columns_of_all_ranks(keys), _columns_of_all_ranks(label), k)
        yield _similarity(keys), label


def _unit(rows: Tensor) -> Tensor:  # [n, D] -> [n, D] f32
    return F.normalize(rows.float(), dim=1)


def _nearest(similarity: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [Q, n], [n]
    """Keys and columns of the k largest similarities of each row, in any order."""
    if k >= similarity.shape[1]:
        return _sortable(similarity, index).topk(similarity.shape[1], dim=1)
    # One more than k tells in which rows the choice is among equal similarities. Only they need a key for every column.
    values, place = similarity.topk(k + 1, dim=1)
    tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
    place = place[:, :k].contiguous()
    keys = _sortable(values[:, :k], index[place])
    if len(tied):
        keys[tied], place[tied] = _sortable(similarity[tied], index).topk(k, dim=1)
    return keys, place


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
        bad += (~_unit(part).isfinite().all(1)).sum()
    bad = all_reduce_sum(bad) + (~queries.isfinite().all(1)).sum()
    if bad:
        raise UserError(f"kNN: {int(bad)} images have features that are NaN or infinite, the encoder has diverged")
