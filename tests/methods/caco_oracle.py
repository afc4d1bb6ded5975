"""CaCo as docs/method.md writes it, pair by pair and dense; it shares nothing with the package.

Legend: B images, K bank rows, C channels, V views.
"""

import torch
from torch import Tensor


def pairs_and_weights(views: int) -> list[tuple[int, int, float]]:
    """(query view, key view, weight): two halves summed, or the mean over 2 large pairs and that over small ones."""
    large = [(0, 1), (1, 0)]
    small = [(view, key) for view in range(2, views) for key in (0, 1)]
    if not small:
        return [(*pair, 1.0) for pair in large]
    return [(*pair, 1 / len(large)) for pair in large] + [(*pair, 1 / len(small)) for pair in small]


def units(bank: Tensor) -> Tensor:
    return bank / bank.pow(2).sum(dim=1, keepdim=True).sqrt()


def positives(keys: Tensor, bank: Tensor) -> list[int]:
    return [max(range(len(bank)), key=row.__getitem__) for row in (keys @ units(bank).T).tolist()]


def loss(queries: list[Tensor], keys: list[Tensor], bank: Tensor, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=bank.dtype)
    for query, key, weight in pairs_and_weights(len(queries)):
        logits = queries[query] @ units(bank).T / temperature  # [B, K]
        chosen = torch.tensor(positives(keys[key], bank))
        total = total + weight * torch.nn.functional.cross_entropy(logits, chosen)
    return total


def bank_gradient(queries: list[Tensor], keys: list[Tensor], bank: Tensor, temperature: float) -> Tensor:
    """The gradient of - mean_i sum_j stop(c_ij) s_ij / t_m, each pair of views by itself."""
    leaf = bank.detach().clone().requires_grad_()
    objective = torch.zeros((), dtype=bank.dtype)
    for query, key, weight in pairs_and_weights(len(queries)):
        similarity = queries[query].detach() @ units(leaf).T  # [B, K]
        c = torch.softmax(similarity.detach() / temperature, dim=1)
        for i, j in enumerate(positives(keys[key], bank)):
            c[i, j] = 1 - c[i, j]
        objective = objective - weight * (c * similarity).sum(dim=1).mean() / temperature
    return torch.autograd.grad(objective, leaf)[0]


def bank_step(bank: Tensor, velocity: Tensor, gradient: Tensor, lr: float, momentum: float, norm: str) -> None:
    velocity.copy_(momentum * velocity + gradient)
    bank.copy_(bank - lr * velocity)
    if norm == "project":
        bank.copy_(units(bank))
