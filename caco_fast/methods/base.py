"""The interface of a method (views and encoders in, loss and bank or queue update out), and all methods by name.

Legend: B images on this rank, R query rows, C embedding size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from caco_fast.bank import KeyQueue, LearnableBank, ShardedBank
from caco_fast.distributed import world_size
from caco_fast.errors import UserError
from caco_fast.models import EncoderPair
from caco_fast.ops.checks import BankUse
from caco_fast.ops.dispatch import BACKENDS
from caco_fast.ops.rates import Rate

BACKEND_HELP = (
    "backend of the bank operations: auto (the CUDA kernels where they run, else tiled), reference, tiled or cuda; the "
    "start of a run checks the kernels against tiled"
)


class Embeddings(NamedTuple):
    """The input of a loss: L2-normalised rows of the views that the method embeds."""

    queries: Sequence[Tensor]  # each [B, C], with gradient
    keys: Sequence[Tensor] = ()  # each [B, C], without gradient


@dataclass
class StepOutput:
    """The differentiable loss of one step, 0-d tensors to log, and the rows for `update`.

    The trainer averages `metrics` between two log lines.
    """

    loss: Tensor  # []
    metrics: dict[str, Tensor] = field(default_factory=dict)
    rows: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Phase:
    """A part of a run: what its steps compute, and how long it lasts.

    The last phase of a run has no number of steps. It is the training: it follows the schedule through all epochs. The
    phases before it run at the peak learning rate, after a warm-up that lasts at most as long as they do. At the end of
    such a phase the optimiser's state is dropped, and the next phase starts with the first epoch's order of images.
    """

    name: str
    objective: Callable[[Sequence[Tensor], EncoderPair], StepOutput]
    # (rows of the objective's output, share of the full rate in (0, 1], flag to skip) -> None; see `Method.update`.
    update: Callable[[Sequence[Tensor], Rate, Tensor | None], None]
    steps: int | None = None
    # Momentum of the key encoder's EMA; None: `schedule.key_momentum`, which rises in the training only.
    key_momentum: float | None = None
    # Called once after the last step, before the optimiser's state is dropped.
    finish: Callable[[EncoderPair], None] = lambda encoders: None
    # Whether a step that fp16 gradients made the optimiser skip is made up for at the end.
    repeats_skipped: bool = False
    # Whether the host reads nothing from the device in a step, so that a CUDA graph can hold it.
    capturable: bool = True


class EncoderNeeds(NamedTuple):
    """What a method asks of the encoders that are built for it."""

    key_encoder: bool = True  # whether it calls `encoders.keys`; if not, no key encoder is built, kept or averaged
    norm_sets: int = 1  # sets of BatchNorm weights and statistics in the query encoder


class Method(nn.Module, ABC):
    """One self-supervised objective, with the bank, queue or layers that it learns with.

    A step of training is: `embed` and `loss` (together `forward`), the backward pass and the optimiser's step, then
    `update`, and then the key encoder's EMA. The trainer treats parameters of a method like those of the query encoder:
    they are optimised, their gradients are averaged over all ranks, and checkpoints hold them. All other state that
    must survive a restart is in buffers.

    Everything that is computed with parameters happens within `forward` (or the objective of another phase). That call
    is the one forward pass that DistributedDataParallel sees, so a method may call the encoders as often as it likes.
    """

    # The name under which it is registered. Its section in a configuration has this name too.
    section: ClassVar[str] = ""
    # What `needs` answers, unless it depends on the settings. `encoders.queries(views, norm_sets)` chooses a set.
    key_encoder: ClassVar[bool] = True
    norm_sets: ClassVar[int] = 1
    # Whether the loss of a batch is the mean of the losses of its parts, so that `trainer.accumulate` may split it. It
    # is not if the negatives come from the batch. `update` follows the last part, with the rows of all.
    accumulates: bool = False
    # In how many parts a batch comes. A bank that adds up the records of all parts divides their weights by it.
    parts: int = 1
    # Metrics that the log line shows after the loss.
    shown: tuple[str, ...] = ("positive_probability",)

    @classmethod
    def build(cls, config: Any, dim: int, sections: Mapping[str, Any]) -> "Method":
        """Make the method from its own settings.

        dim: C. sections: the settings of every method by its name; a method that wraps another one builds it by
        `build_method(name, dim, sections)`.
        """
        return cls(config, dim)

    @classmethod
    def needs(cls, config: Any, sections: Mapping[str, Any]) -> EncoderNeeds:
        """What the method asks of the encoders with these settings; `sections` as in `build`."""
        return EncoderNeeds(cls.key_encoder, cls.norm_sets)

    @classmethod
    def reads(cls, config: Any) -> Sequence[str]:
        """The methods' sections that it reads: its own, and that of the method which it is built on, if any."""
        return (cls.section,)

    @abstractmethod
    def check_views(self, sizes: Sequence[int]) -> None:
        """Raise UserError if the method can't use views of these sides in pixels, in the configured order."""

    @abstractmethod
    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        """Queries and keys of the views, [B, channels, h, w] each, in the configured order."""

    @abstractmethod
    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        """The loss of one step.

        record: whether a learned bank keeps what its next step needs. A loss that is taken only for its gradient, such
        as that of an adversarial example, is not recorded.
        """

    def forward(self, views: Sequence[Tensor], encoders: EncoderPair) -> StepOutput:
        """Views, [B, channels, h, w] each, in the configured order, to the loss of this step."""
        return self.loss(self.embed(views, encoders))

    def adversarial_loss(self, embeddings: Embeddings, anchor: Tensor, other: Tensor) -> Tensor:  # [B, C] each -> []
        """The loss of view a against an image that a wrapper has changed, such as an adversarial example of it.

        embeddings: those of the clean views, from `embed`. anchor: query of the clean view a. other: query of the
        changed image. A method with keys takes `other` as the query and leaves `anchor` out. Nothing is recorded.

        Raises:
            NotImplementedError: the method has no such loss, so that a wrapper must refuse it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss for adversarial examples")

    def update(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        """Step the bank or queue after the optimiser's step.

        rows: those of the output of `forward`. warmup: share of the full rate, in (0, 1].
        skip: a 0-d flag on the device. If it is not 0, the optimiser has skipped this step, and so must the bank.
        """

    def phases(self, batch_size: int) -> list[Phase]:
        """The phases of a run at this global batch size, in their order; the training is the last one."""
        return [Phase("training", self, self.update)]

    def losses(self) -> Sequence[nn.Module]:
        """The parts of `loss` that torch.compile may take, each without a graph break."""
        return ()

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        """How a step uses the bank operations, for the check of the kernels before the first step.

        images: B. views: of each image. Every bank and queue is found, but not with which rows and temperatures the
        method calls it; a method that knows says so.
        """
        return list(_uses_within(self, f"{self.section}.backend", images, views))

    def rates(self, warmup: float) -> dict[str, float]:
        """The rates of `update` at this warm-up, and other values that are read on log steps only."""
        return {}


def use_of(bank: LearnableBank | KeyQueue, setting: str, rows: int, **known: Any) -> BankUse:
    """The use of a bank by R rows of this rank, with what else is known of it."""
    known = {"temperatures": ((0.1,),), **known}
    if isinstance(bank, KeyQueue):
        return BankUse(setting, bank.backend, rows, *bank.queue.shape, **known)
    if isinstance(bank, ShardedBank):
        rows *= world_size()
    of_bank = {"step_temperature": known["temperatures"][0][-1], "norm": bank.norm, "weight_decay": bank.weight_decay}
    known = {**of_bank, **known}
    return BankUse(setting, bank.backend, rows, *bank.bank.shape, **known)


def _uses_within(module: nn.Module, setting: str, images: int, views: int) -> Iterator[BankUse]:
    for child in module.children():
        if isinstance(child, Method):
            yield from child.bank_uses(images, views)
        elif isinstance(child, (LearnableBank, KeyQueue)):
            yield use_of(child, setting, images * views)
        else:
            yield from _uses_within(child, setting, images, views)


class Registered(NamedTuple):
    """A method with the dataclass of its settings and the help line of its section."""

    method: type[Method]
    config: type
    help: str


METHODS: dict[str, Registered] = {}

M = TypeVar("M", bound=type[Method])


def register(name: str, config: type, help: str) -> Callable[[M], M]:
    """Decorate a method's class: `method=NAME` then chooses it, and the section NAME of a configuration sets it.

    config: a frozen dataclass whose fields are made by `caco_fast.settings.setting`.

    Raises:
        ValueError: another class has that name already.
    """

    def add(method: M) -> M:
        if name in METHODS and METHODS[name].method.__qualname__ != method.__qualname__:
            raise ValueError(f"method {name!r}: {METHODS[name].method.__name__} has that name already")
        METHODS[name] = Registered(method, config, help)
        method.section = name
        return method

    return add


def registered(name: str) -> Registered:
    """A method by its name.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"method: found '{name}', expected one of {', '.join(METHODS)}")
    return METHODS[name]


def build_method(name: str, dim: int, sections: Mapping[str, Any]) -> Method:
    """A method from its section of the settings. dim: C. Raises UserError if there is no such method."""
    return registered(name).method.build(sections[name], dim, sections)


def check_settings(section: str, config: Any, positive: Sequence[str]) -> None:
    """Raise UserError if a setting named in `positive` is not above 0, or a `backend` is unknown to the operations."""
    for name in positive:
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"{section}.{name}: found {getattr(config, name)}, expected a number above 0")
    if getattr(config, "backend", "auto") not in BACKENDS:
        raise UserError(f"{section}.backend: found '{config.backend}', expected one of {', '.join(BACKENDS)}")
