"""An evaluation of the bank formulas that shares nothing with the package: Python loops over floats, and autograd.

Legend: R query rows, K bank rows, C channels, M positives per row.
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


def attend(queries: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
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
    return torch.tensor(lse, dtype=torch.float64), torch.tensor(means, dtype=torch.float64).view(
        len(lse), bank.shape[1]
    )


def select(keys: Tensor, bank: Tensor) -> list[int]:
    return [row.index(max(row)) for row in similarities(keys, bank)]


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
    q, lse = queries.tolist(), attend(queries, bank, temperature)[0].tolist()
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


def gradient_by_autograd(
    bank: Tensor,
    queries: Tensor,
    temperature: float,
    row_weight: list[float],
    positives: list[list[int]],
    positive_weight: Matrix,
) -> Tensor:
    """g [K, C] as the gradient of - sum_i a_i sum_j stop(c_ij) s_ij / t."""
    bank = bank.detach().clone().requires_grad_()
    s = queries @ (bank / bank.norm(dim=1, keepdim=True)).T  # [R, K]
    c = torch.softmax(s.detach() / temperature, dim=1)  # [R, K]
    p = c.clone()
    for i, (row, weights) in enumerate(zip(positives, positive_weight, strict=True)):
        for pi, o in zip(row, weights, strict=True):
            c[i, pi] += o * (1 - 2 * p[i, pi])
    weight = torch.tensor(row_weight, dtype=bank.dtype).unsqueeze(1)
    return torch.autograd.grad(-(weight * c * s).sum() / temperature, bank)[0]


def gradient_of_loss(bank: Tensor, queries: Tensor, temperature: float, row_weight: list[float]) -> Tensor:
    """The gradient of - sum_i a_i lse_i, which is g for M = 0."""
    bank = bank.detach().clone().requires_grad_()
    s = queries @ (bank / bank.norm(dim=1, keepdim=True)).T  # [R, K]
    lse = torch.logsumexp(s / temperature, dim=1)
    return torch.autograd.grad(-(torch.tensor(row_weight, dtype=bank.dtype) * lse).sum(), bank)[0]
