"""The interface of an evaluation protocol, and all protocols by name.

A protocol is one file: a frozen dataclass of settings and a function `(context, settings) -> Result`, decorated by
`@register("knn", KnnConfig, "line of help")`. `caco-fast evaluate SOURCE knn knn.k=[20]` runs it.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caco_fast.data import DataConfig, Source, build_source
from caco_fast.data.sources.channels import with_channels
from caco_fast.distributed import rank
from caco_fast.engine.agreement import together
from caco_fast.errors import UserError
from caco_fast.evaluate.folded import Folded
from caco_fast.pretrained import Pretrained
from caco_fast.protocols.features import AugmentedView, Extraction, FeatureSet

log = logging.getLogger("caco_fast.evaluation")

GREY = "the backbone takes grey images, so those of colour are shown in grey"
COLOUR = "the backbone takes images of colour, so grey ones are shown as three equal channels"


@dataclass(frozen=True)
class Published:
    """A number of a paper or of a code base, next to which a result is shown."""

    who: str  # "CaCo, ResNet-50, 800 epochs"
    value: float  # in the unit of the headline
    where: str  # "CaCo paper, Table II"
    metric: str = ""  # the figure that it is for; empty: the headline


@dataclass
class Result:
    """What a protocol found. The first metric is the headline."""

    metrics: dict[str, float]  # per cent, unless the name says otherwise
    # How far the headline may be off by the choice of test images alone, in its unit; None: not estimated.
    standard_error: float | None = None
    # What was tried, one entry for each value: {"lr": 0.4, "last": 71.2, ...}.
    sweep: list[dict[str, Any]] = field(default_factory=list)
    # {"food101": {"train": {"found": 75750, "published": 75750}, ...}}
    counts: dict[str, Any] = field(default_factory=dict)
    # Settings that differ from the preset of the protocol: {"linear.epochs": {"found": 1, "preset": 100}}.
    deviations: dict[str, Any] = field(default_factory=dict)
    published: list[Published] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Names of pictures and other files that were written beside the result.
    files: list[str] = field(default_factory=list)


class Context:
    """What every protocol gets: the backbone on this rank's device, the data, and features that are extracted once.

    Every rank runs the same protocols and gives its shard of the images.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        data: DataConfig,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        batch_size: int,
        seed: int,
        folder: Path,
        cache: Path | None = Path("features"),
    ) -> None:
        """`cache`: where features are kept, relative to `folder`; None: nowhere."""
        self.pretrained = pretrained
        self.backbone: nn.Module = pretrained.backbone.to(device).requires_grad_(False)
        # torch's type hints leave out this argument.
        self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.data = data
        self._listed: dict[str, Source] = {}
        self.device = device
        self.autocast = autocast
        self.batch_size = batch_size
        self.seed = seed
        # Where results are written, and what a protocol keeps to continue after a stop.
        self.folder = folder
        self.cache = folder / cache if cache is not None else None
        # The backbone for features alone, without BatchNorms.
        self.folded = Folded(self.backbone, self.precision)

    def precision(self) -> AbstractContextManager:
        """The context that the backbone computes in."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def identity(self) -> dict[str, Any]:
        """What the state of a protocol depends on, besides its own settings and images."""
        places = {"workers": None, "prefetch": None, "path": None, "root": None}
        return {
            "weights": self.pretrained.weights_sha256,
            "autocast": str(self.autocast),
            "seed": self.seed,
            "data": asdict(self.data) | places,
        }

    def source(self, split: str, data: DataConfig | None = None) -> Source:
        """The images of a split of `data`, by default the data of the evaluation, as the backbone takes them."""
        # Listed once for all protocols: ImageNet has 1.28 M names.
        if data in (None, self.data) and split in self._listed:
            return self._listed[split]
        # Mean and deviation are those of the images as the backbone takes them, which may have other channels.
        found = self.readable(build_source(replace(data or self.data, mean=None, std=None), split))
        if data in (None, self.data):
            self._listed[split] = found
        return found

    def readable(self, source: Source) -> Source:
        """The images with as many channels as the backbone takes: grey as three equal ones, colour as grey."""
        found = with_channels(source, self.pretrained.channels)
        if found.channels != source.channels and rank() == 0:
            log.info("%s", GREY if found.channels == 1 else COLOUR)
        return found

    def features(
        self,
        split: str,
        data: DataConfig | None = None,
        source: Source | None = None,
        *,
        view: AugmentedView | None = None,
        labelled: bool = True,
    ) -> FeatureSet:
        """Features of the backbone over a split, from the cache if they are there (collective).

        source: the images, if they are not those of `data` and `split`. data: then says how they are read and resized.
        view: a random view of each image; None: without augmentation. labelled: whether labels are needed.

        Raises:
            UserError: images are missing or can't be read, or the cache can't be written, on all ranks alike.
        """
        work = self._extraction(split, data, source, view, labelled)
        if self.cache is None:
            return work.without_cache()
        return work.cached(self.cache, self._computed_by())

    def all_features(self, split: str, source: Source | None = None, *, labelled: bool = True) -> FeatureSet:
        """The features of all ranks on every rank, mapped from the cache, which must be there (collective)."""
        if self.cache is None:
            raise ValueError("all_features needs a cache")
        work = self._extraction(split, None, source, None, labelled)
        return work.cached(self.cache, self._computed_by(), whole=True)

    def _extraction(
        self, split: str, data: DataConfig | None, source: Source | None, view: AugmentedView | None, labelled: bool
    ) -> Extraction:
        config = data or self.data
        found = together(lambda: self.source(split, config)) if source is None else self.readable(source)
        return Extraction(
            encoder=self.folded,
            precision=self.precision,
            source=found,
            split=split,
            config=config,
            view=view,
            batch_size=self.batch_size,
            device=self.device,
            labelled=labelled,
        )

    def _computed_by(self) -> dict[str, Any]:
        return {"weights": self.pretrained.weights_sha256, "precision": str(self.autocast or torch.float32)}


@dataclass(frozen=True)
class Registered:
    run: Callable[[Context, Any], Result]
    config: type
    help: str


PROTOCOLS: dict[str, Registered] = {}


def register(name: str, config: type, help: str) -> Callable[[Callable[[Context, Any], Result]], Callable]:
    """A decorator that makes a function the protocol of this name, with its section of settings."""

    def decorate(run: Callable[[Context, Any], Result]) -> Callable[[Context, Any], Result]:
        if name in PROTOCOLS:
            raise ValueError(f"protocol {name!r} is registered twice")
        PROTOCOLS[name] = Registered(run, config, help)
        return run

    return decorate


def registered(name: str) -> Registered:
    """The protocol of this name. UserError, with the nearest name, if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol: found '{name}', expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
