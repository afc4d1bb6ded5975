"""The formulas of docs/method.md a second time, without the package: Python loops over floats, dense tensors, autograd.

Legend: R query rows, K bank rows, C channels, M positives per row, B images, V views.
"""

import math

import torch
from torch import Tensor

Matrix = list[list[float]]


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(x * x for x in row))
    return [x / length for x in row]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def similarities(rows: Tensor, bank: Tensor) -> Matrix:  # [R, C], [K, C] -> [R][K]
    units = [unit(row) for row in bank.tolist()]
    return [[dot(row, u) for u in units] for row in rows.tolist()]


def select(keys: Tensor, bank: Tensor) -> list[int]:
    return [row.index(max(row)) for row in similarities(keys, bank)]


def attend_by_loops(queries: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """lse [R], mean_row [R, C]"""
    units = [unit(row) for row in bank.tolist()]
    lse, means = [], []
    for row in similarities(queries, bank):
        top = max(row)
        weights = [math.exp((s - top) / temperature) for s in row]
        total = math.fsum(weights)
        lse.append(math.log(total) + top / temperature)
        columns = zip(*units, strict=True)
        means.append([math.fsum(w * x for w, x in zip(weights, column, strict=True)) / total for column in columns])
    shape = len(lse), bank.shape[1]
    return torch.tensor(lse, dtype=torch.float64), torch.tensor(means, dtype=torch.float64).view(shape)


def gradient_by_loops(
    bank: Tensor,
    queries: Tensor,
    temperature: float,
    row_weight: list[float],
    positives: list[list[int]],
    positive_weight: Matrix,
) -> Tensor:
    """g [K, C], term by term as docs/method.md writes it."""
    s = similarities(queries, bank)
    q, lse = queries.tolist(), attend_by_loops(queries, bank, temperature)[0].tolist()
    gradient = []
    for j, row in enumerate(bank.tolist()):
        u, length = unit(row), math.sqrt(dot(row, row))
        terms = []
        for i, query in enumerate(q):
            p = math.exp(s[i][j] / temperature - lse[i])
            chosen = math.fsum(o for pi, o in zip(positives[i], positive_weight[i], strict=True) if pi == j)
            c = p + chosen * (1 - 2 * p)
            terms.append([row_weight[i] * c * (query[k] - s[i][j] * u[k]) for k in range(len(u))])
        gradient.append([-math.fsum(term[k] for term in terms) / (temperature * length) for k in range(len(u))])
    return torch.tensor(gradient, dtype=torch.float64)


def unit_rows(bank: Tensor) -> tuple[Tensor, Tensor]:
    """u [K, C] and 1 / |w| [K, 1] in f64; both zero for a row of zeros."""
    bank = bank.double()
    norm = bank.norm(dim=1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    return bank * inverse, inverse


def attend(queries: Tensor, unit: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse [R], softmax [R, K], mean row [R, C] of queries and unit rows in f64."""
    scores = queries.double() @ unit.T / temperature
    p = torch.softmax(scores, dim=1)
    return torch.logsumexp(scores, dim=1), p, p @ unit


def gradient(
    bank: Tensor,
    queries: Tensor,
    p: Tensor,  # [R, K]
    temperature: float,
    row_weight: Tensor,  # [R]
    positives: Tensor,  # [R, M]
    positive_weight: Tensor,  # [R, M]
) -> Tensor:
    """g [K, C] as the gradient of - sum_i a_i sum_j stop(c_ij) s_ij / t; that of a row of zeros is zero."""
    bank = bank.detach().double().requires_grad_()
    # A row of zeros has no direction, and the derivative of its norm would be NaN.
    empty = (bank == 0).all(dim=1, keepdim=True)
    norm = torch.where(empty, 1.0, bank).norm(dim=1, keepdim=True)
    s = queries.double() @ torch.where(empty, 0.0, bank / norm).T  # [R, K]
    c = p.double().clone()
    for i, row in enumerate(positives.tolist()):
        for m, pi in enumerate(row):
            c[i, pi] += positive_weight[i, m].double() * (1 - 2 * p[i, pi])
    weight = row_weight.double().unsqueeze(1)
    return torch.autograd.grad(-(weight * c * s).sum() / temperature, bank)[0]


def gradient_of_loss(bank: Tensor, queries: Tensor, temperature: float, row_weight: Tensor) -> Tensor:
    """The gradient of - sum_i a_i lse_i, which is g for M = 0."""
    bank = bank.detach().clone().requires_grad_()
    s = queries @ (bank / bank.norm(dim=1, keepdim=True)).T  # [R, K]
    lse = torch.logsumexp(s / temperature, dim=1)
    return torch.autograd.grad(-(row_weight * lse).sum(), bank)[0]


def step(
    bank: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    lr: float,
    momentum: float,
    project: bool = False,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Bank and velocity after V <- mu V + g + wd W, W <- W - eta V."""
    velocity = momentum * velocity.double() + gradient + weight_decay * bank.double()
    bank = bank.double() - lr * velocity
    return (unit_rows(bank)[0] if project else bank), velocity


def pairs_and_weights(views: int) -> list[tuple[int, int, float]]:
    """(query view, key view, weight): two halves summed, or the mean over 2 large pairs and that over small ones."""
    large = [(0, 1), (1, 0)]
    small = [(view, key) for view in range(2, views) for key in (0, 1)]
    if not small:
        return [(*pair, 1.0) for pair in large]
    return [(*pair, 1 / len(large)) for pair in large] + [(*pair, 1 / len(small)) for pair in small]


def caco_loss(queries: list[Tensor], keys: list[Tensor], bank: Tensor, temperature: float) -> Tensor:
    """The loss of CaCo, pair of views by pair. V queries [B, C], keys [B, C]"""
    total = torch.zeros((), dtype=torch.float64)
    for query, key, weight in pairs_and_weights(len(queries)):
        logits = queries[query].double() @ unit_rows(bank)[0].T / temperature  # [B, K]
        chosen = torch.tensor(select(keys[key], bank))
        total = total + weight * torch.nn.functional.cross_entropy(logits, chosen)
    return total


def caco_gradient(queries: list[Tensor], keys: list[Tensor], bank: Tensor, temperature: float) -> Tensor:
    """g [K, C] of CaCo, the sum of those of each pair of views."""
    total = torch.zeros(bank.shape, dtype=torch.float64)
    for query, key, weight in pairs_and_weights(len(queries)):
        rows = queries[query].detach()
        p = attend(rows, unit_rows(bank)[0], temperature)[1]  # [B, K]
        chosen = torch.tensor(select(keys[key], bank)).unsqueeze(1)  # [B, 1]
        row_weight = torch.full((len(rows),), weight / len(rows), dtype=torch.float64)
        total += gradient(bank, rows, p, temperature, row_weight, chosen, torch.ones(chosen.shape))
    return total
