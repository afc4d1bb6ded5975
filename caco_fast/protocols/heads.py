"""Linear classifiers of the same features, trained side by side: one product of matrices for all of them.

Each has a learning rate and an optimiser state of its own, and trains as it would alone.

Legend: H heads, B rows of this rank in a step, N rows of a set, D feature size, C classes.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.distributed import all_reduce_sum
from caco_fast.ops.tiling import f32_products

# Values of the logits that are made at a time when a set is scored.
LOGITS = 2**24


class HeadRecipe(Protocol):
    """What a head reads of its settings; `LinearRecipe` describes them."""

    @property
    def optimizer(self) -> str: ...
    @property
    def momentum(self) -> float: ...
    @property
    def nesterov(self) -> bool: ...
    @property
    def trust(self) -> float: ...
    @property
    def trust_bias(self) -> bool: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def norm(self) -> bool: ...
    @property
    def init_std(self) -> float: ...


class Heads:
    """H linear classifiers [C, D] + [C] that start from the same weights."""

    def __init__(
        self,
        dim: int,
        classes: int,
        lrs: list[float],
        recipe: HeadRecipe,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.lrs, self.recipe, self.classes = lrs, recipe, classes
        # On the host, so that every device begins alike.
        first = torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed)) * recipe.init_std
        self.weight = first.to(device, dtype).repeat(len(lrs), 1, 1)  # [H, C, D]
        self.bias = self.weight.new_zeros(len(lrs), classes)  # [H, C]
        self.velocities = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        # Of the features, for `norm`, as BatchNorm1d(D, affine=False) keeps them.
        self.mean, self.var = self.weight.new_zeros(dim), self.weight.new_ones(dim)

    @f32_products()
    def step(self, features: Tensor, labels: Tensor, factor: float, total: int) -> Tensor:
        """One step of every head on this rank's rows [B, D] with labels [B]; the loss of each head before it, [H].

        factor: of every learning rate. total: rows of all ranks, which may give different numbers of them. All ranks
        keep equal heads (collective).
        """
        rows = features.to(self.weight.dtype)
        if self.recipe.norm:
            rows = self._normalised_batch(rows, total)
        parameters = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        with torch.enable_grad():
            logits = self._logits(rows).flatten(0, 1)  # [B H, C]
            own = labels.repeat_interleave(len(self.lrs))
            losses = F.cross_entropy(logits, own, reduction="none").view(len(rows), len(self.lrs)).sum(0) / total
            gradients = torch.autograd.grad(losses.sum(), parameters)
        with torch.no_grad():
            for value, velocity, gradient in zip(parameters, self.velocities, gradients):
                self._move(value.detach(), velocity, all_reduce_sum(gradient), factor)
            return all_reduce_sum(losses.detach())

    def _move(self, value: Tensor, velocity: Tensor, gradient: Tensor, factor: float) -> None:  # [H, ...] each
        """A step of SGD as torch computes it; with larc each head's gradient is scaled by its trust ratio first."""
        recipe = self.recipe
        larc = recipe.optimizer == "larc" and (value.ndim == 3 or recipe.trust_bias)
        ratio = self._trust_ratio(value, gradient) if larc else None
        if recipe.weight_decay:
            gradient = gradient.add(value, alpha=recipe.weight_decay)
        if ratio is not None:
            gradient = gradient * ratio
        velocity.mul_(recipe.momentum).add_(gradient)
        direction = gradient.add(velocity, alpha=recipe.momentum) if recipe.nesterov else velocity
        for head, lr in enumerate(self.lrs):
            value[head].add_(direction[head], alpha=-lr * factor)

    def _trust_ratio(self, value: Tensor, gradient: Tensor) -> Tensor:  # [H, 1, ...]
        """trust |w| / (|g| + decay |w| + eps), and 1 where a norm is 0: LARC of Apex without its clip."""
        of_value, of_gradient = (part.flatten(1).norm(dim=1) for part in (value, gradient))
        ratio = self.recipe.trust * of_value / (of_gradient + self.recipe.weight_decay * of_value + 1e-8)
        ratio = torch.where((of_value > 0) & (of_gradient > 0), ratio, 1.0)
        return ratio.view(-1, *[1] * (value.ndim - 1))

    def _logits(self, rows: Tensor) -> Tensor:  # [B, D] -> [B, H, C]
        flat = F.linear(rows, self.weight.flatten(0, 1), self.bias.flatten())
        return flat.unflatten(1, (len(self.lrs), self.classes))

    def _normalised_batch(self, rows: Tensor, count: int) -> Tensor:
        """BatchNorm without weights over the rows of all ranks, which also moves the running statistics."""
        mean = all_reduce_sum(rows.sum(0, dtype=torch.float64)) / count
        var = all_reduce_sum((rows.double() - mean).square().sum(0)) / count
        self.mean.lerp_(mean.to(rows.dtype), 0.1)
        self.var.lerp_((var * count / max(count - 1, 1)).to(rows.dtype), 0.1)
        return ((rows - mean) * (var + 1e-5).rsqrt()).to(rows.dtype)

    @f32_products()
    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Per cent of the rows of all ranks whose label is a head's first answer, or among its first five (collective).

        features: [N, D] of this rank, on any device. Returns [2, H] on the host.
        """
        device = self.weight.device
        hits = torch.zeros(2, len(self.lrs), dtype=torch.int64, device=device)
        rows_at_once = max(1, LOGITS // (len(self.lrs) * self.classes))
        for start in range(0, len(labels), rows_at_once):
            part = slice(start, start + rows_at_once)
            rows = features[part].to(device, self.weight.dtype)
            if self.recipe.norm:
                rows = (rows - self.mean) * (self.var + 1e-5).rsqrt()
            found = self._logits(rows).topk(min(5, self.classes), dim=2).indices  # [n, H, 5]
            correct = found == labels[part].to(device).view(-1, 1, 1)
            hits[0] += correct[:, :, 0].sum(0)
            hits[1] += correct.any(2).sum(0)
        total = all_reduce_sum(torch.tensor(len(labels), device=device))
        return (100.0 * all_reduce_sum(hits).double() / total).cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "bias": self.bias, "velocities": self.velocities, "norm": [self.mean, self.var]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.state_dict()
        for name in ("weight", "bias"):
            own[name].copy_(state[name])
        for name in ("velocities", "norm"):
            for value, saved in zip(own[name], state[name], strict=True):
                value.copy_(saved)
