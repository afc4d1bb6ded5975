"""Small methods that need what CaCo and MoCo do not: layers of their own, no key encoder, a second BatchNorm set, a
wrapped method. Each is one class; nothing else in the trainer knows of them.

Legend: B images on this rank, C embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from caco_fast.distributed import all_gather_rows, rank
from caco_fast.methods import METHODS, Embeddings, Method, StepOutput, build_method, register
from caco_fast.models import EncoderPair
from caco_fast.settings import setting


@dataclass(frozen=True)
class Temperature:
    temperature: float = setting(0.2, "t of the loss")


class Small(Method):
    shown = ()

    def __init__(self, config: Any, dim: int) -> None:
        super().__init__()
        self.config = config

    def check_views(self, sizes: Sequence[int]) -> None: ...


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:  # [B, C], [B, C] -> []
    """InfoNCE against the keys of all ranks."""
    labels = torch.arange(len(queries)) + rank() * len(queries)
    return cross_entropy(queries @ all_gather_rows(keys).T / temperature, labels)


class Predicting(Small):
    """A predictor after the query encoder, as NNCLR has one."""

    def __init__(self, config: Temperature, dim: int) -> None:
        super().__init__(config, dim)
        self.predictor = nn.Sequential(nn.Linear(dim, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, dim))

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        return Embeddings(encoders.queries(views[:1]), encoders.keys(views[1:]))

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        (query,), (key,) = embeddings
        predicted = normalize(self.predictor(query), dim=1)
        return StepOutput(contrast(predicted, key, self.config.temperature))


class Idle(Predicting):
    """A layer that the loss does not use."""

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        (query,), (key,) = embeddings
        return StepOutput(contrast(query, key, self.config.temperature))


class Keyless(Small):
    """No key encoder, and two forwards of the query encoder in a step."""

    key_encoder = False

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        return Embeddings([encoders.queries([view])[0] for view in views])

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        a, b = embeddings.queries
        return StepOutput(contrast(a, b.detach(), self.config.temperature) + (a - b).square().sum(dim=1).mean())


@dataclass(frozen=True)
class AdversarialConfig:
    base: str = setting("moco", "the method whose loss is attacked")
    eps: float = setting(0.03, "size of the attack in units of normalised images")


class Adversarial(Small):
    """Adversarial examples by a second BatchNorm set, as CLAE has them."""

    norm_sets = 2

    def __init__(self, config: AdversarialConfig, base: Method) -> None:
        super().__init__(config, 0)
        self.base = base

    @classmethod
    def build(cls, config: AdversarialConfig, dim: int, sections: Mapping[str, Any]) -> "Adversarial":
        return cls(config, build_method(config.base, dim, sections))

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        clean = self.base.embed(views, encoders)
        view = views[0].detach().requires_grad_()
        attacked = clean._replace(queries=encoders.embed([view], norm_sets=[1]))
        (gradient,) = torch.autograd.grad(self.base.loss(attacked, record=False).loss, view)
        adversarial = encoders.queries([views[0] + self.config.eps * gradient.sign()], norm_sets=[1])
        return clean._replace(queries=[*clean.queries, *adversarial])

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        *clean, adversarial = embeddings.queries
        output = self.base.loss(embeddings._replace(queries=clean), record)
        other = self.base.loss(embeddings._replace(queries=[adversarial]), record=False)
        return StepOutput(output.loss + other.loss, output.metrics, output.rows)

    def update(self, rows: Sequence[Tensor], warmup: Any, skip: Tensor | None = None) -> None:
        self.base.update(rows, warmup, skip)


METHODS_OF_TESTS = {
    "predicting": (Predicting, Temperature),
    "idle": (Idle, Temperature),
    "keyless": (Keyless, Temperature),
    "adversarial": (Adversarial, AdversarialConfig),
}


def add_methods() -> None:
    """Register them in this process, as a user's file does with its own."""
    for name, (method, config) in METHODS_OF_TESTS.items():
        register(name, config, method.__doc__ or "")(method)


def remove_methods() -> None:
    """Leave the registry to other tests: a configuration has a section for every registered method."""
    for name in METHODS_OF_TESTS:
        METHODS.pop(name, None)
