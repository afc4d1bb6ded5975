"""CLAE (Ho and Vasconcelos, arXiv 2010.12050): another method that also learns from adversarial examples of view a.

The formulas are in docs/method.md.

Legend: b images on this rank, C embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from caco_fast.errors import UserError
from caco_fast.methods.base import (
    METHODS,
    Embeddings,
    EncoderNeeds,
    Method,
    Phase,
    StepOutput,
    build_method,
    register,
    registered,
)
from caco_fast.models import EncoderPair
from caco_fast.ops.rates import Rate
from caco_fast.settings import setting

# Factor of an image's own loss in the attack under fp16: with the 1/b of the mean, 2^16 at b = 256, where GradScaler
# begins too.
FP16_SCALE = 2.0**8
# The set of BatchNorms of f_adv; the base uses set 0.
ADVERSARIAL = 1


def bases() -> list[str]:
    """The methods that have a loss for adversarial examples."""
    return [name for name, entry in METHODS.items() if entry.method.adversarial_loss is not Method.adversarial_loss]


@dataclass(frozen=True)
class CLAEConfig:
    base: str = setting("simclr", "the method whose loss is attacked: simclr, infonce, moco, adco or caco")
    eps: float = setting(0.03, "length of the attack in every pixel, in units of normalised images")
    alpha: float = setting(1.0, "weight of the loss of the adversarial examples")

    def __post_init__(self) -> None:
        if self.base not in bases():
            raise UserError(f"clae.base: found '{self.base}', expected one of {', '.join(bases())}")
        for name in ("eps", "alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"clae.{name}: found {getattr(self, name)}, expected 0 or more")


@register("clae", CLAEConfig, "CLAE: adversarial examples for another method")
class CLAE(Method):
    """L_total = L(base) + alpha L(f(x_a), f_adv(x_adv)), with L the base's `adversarial_loss`, and

        x_adv = x_a + eps sign( d L(stop f_adv(x_a), f_adv(x)) / dx at x = x_a )

    f_adv is f with BatchNorms of its own. The attack is one more forward and backward, which reaches no parameter.
    """

    def __init__(self, config: CLAEConfig, base: Method) -> None:
        super().__init__()
        self.config = config
        self.base = base
        self.accumulates = base.accumulates
        self.shown = base.shown

    @classmethod
    def build(cls, config: CLAEConfig, dim: int, sections: Mapping[str, Any]) -> "CLAE":
        return cls(config, build_method(config.base, dim, sections))

    @classmethod
    def needs(cls, config: CLAEConfig, sections: Mapping[str, Any]) -> EncoderNeeds:
        of_base = registered(config.base).method.needs(sections[config.base], sections)
        return of_base._replace(norm_sets=2)

    @classmethod
    def reads(cls, config: CLAEConfig) -> Sequence[str]:
        return (cls.section, config.base)

    def check_views(self, sizes: Sequence[int]) -> None:
        self.base.check_views(sizes)

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        """Embeddings of the base, and as the last query that of the adversarial example."""
        clean = self.base.embed(views, encoders)
        adversarial = encoders.queries([self.attack(views[0], clean, encoders)], norm_sets=[ADVERSARIAL])
        return clean._replace(queries=[*clean.queries, *adversarial])

    def attack(self, view: Tensor, clean: Embeddings, encoders: EncoderPair) -> Tensor:
        """The adversarial example of view a. [b, channels, h, w] -> the same"""
        constants = Embeddings(*([row.detach() for row in rows] for rows in clean))
        image = view.detach().requires_grad_()
        # f_adv(x_a) as the constant anchor has the same value, so it needs no forward of its own.
        with torch.enable_grad():
            (query,) = encoders.embed([image], norm_sets=[ADVERSARIAL])
            loss = self.base.adversarial_loss(constants, query.detach(), query)
        if encoders.query.autocast == torch.float16:
            # The sign alone counts, so that the factor has no other effect than to keep gradients from underflow.
            loss = loss * (FP16_SCALE * len(view))
        (gradient,) = torch.autograd.grad(loss, image)
        # In fp16 an overflow may give NaN, whose sign is 0 in torch: such a pixel stays as it is.
        return view + self.config.eps * gradient.sign()

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        *queries, adversarial = embeddings.queries
        clean = embeddings._replace(queries=queries)
        output = self.base.loss(clean, record)
        of_adversarial = self.base.adversarial_loss(clean, queries[0], adversarial)
        metrics = {**output.metrics, "adversarial_loss": of_adversarial.detach()}
        return StepOutput(output.loss + self.config.alpha * of_adversarial, metrics, output.rows)

    def update(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        self.base.update(rows, warmup, skip)

    def phases(self, batch_size: int) -> list[Phase]:
        """Phases of the base; those before the training know of no adversarial examples."""
        *before, training = self.base.phases(batch_size)
        return [*before, replace(training, objective=self, update=self.update)]

    def losses(self) -> Sequence[nn.Module]:
        return self.base.losses()

    def rates(self, warmup: float) -> dict[str, float]:
        return self.base.rates(warmup)
