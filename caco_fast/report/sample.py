"""A bounded sample of a run's images, and what the encoders of its checkpoints make of them.

Each image is read once, for all encoders. Nothing here is collective, so that one rank of a run may do it alone.

Legend: N images of the sample, D feature size, C embedding size, K bank rows, b images of a batch.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from caco_fast.config import Config
from caco_fast.data import ArraySource, DataConfig, Source, build_eval_loader, build_source
from caco_fast.data.loaders.evaluation import EvalLoader
from caco_fast.data.sources.part import imbalanced, labels_of, take
from caco_fast.engine.checkpoint import checkpoints_in
from caco_fast.engine.precision import autocast_dtype
from caco_fast.errors import UserError
from caco_fast.evaluate import extract_features
from caco_fast.models import Encoder
from caco_fast.ops import bank_select
from caco_fast.pretrained.encoders import Saved, random_backbone, read_encoders
from caco_fast.protocols.images import evenly_spaced
from caco_fast.protocols.sheet import thumbnail
from caco_fast.settings import require_at_least, setting

# b on a GPU; and the pixels of a batch on a CPU, where it is smaller, so that a slow one can stop in time.
BATCH, PIXELS = 64, 2**18
# Shares of the time: training images, test images, and those of the map.
SHARES = 0.6, 0.25, 0.15
# Pixels of a thumbnail of an image that has no more, and of others.
SMALL, LARGE = 64, 96
# Classes of the map: more colours can't be told apart.
CLASSES = 10


@dataclass(frozen=True)
class PicturesConfig:
    train_images: int = setting(5_000, "training images that are read, evenly spaced over the set")
    test_images: int = setting(2000, "test images that are read; without any, other training images take their place")
    seconds: int = setting(120, "seconds to read and embed them in; when they are over, fewer images are shown")
    checkpoints: int = setting(5, "checkpoints over which the share of right surrogates is shown, at most")

    def __post_init__(self) -> None:
        for name, least in (("train_images", 50), ("test_images", 30), ("seconds", 1), ("checkpoints", 1)):
            require_at_least(f"pictures.{name}", getattr(self, name), least)


class Seen(NamedTuple):
    """Images that were read, in no order, and what the encoders make of them."""

    source: Source
    index: Tensor  # type: ignore[assignment]  # [N], positions in the source
    labels: Tensor  # [N]; -1 without labels
    outputs: Sequence[Tensor]  # [N, ...] of each encoder that was asked


class Sample:
    """The encoders of a run's checkpoints and their outputs; each is computed when it is first asked for."""

    def __init__(self, folder: Path, settings: PicturesConfig, device: torch.device) -> None:
        """Read the newest intact checkpoint. UserError if there is none."""
        self.settings, self.device = settings, device
        files = _checkpoints(folder / "checkpoints")
        if not files:
            raise UserError(f"{folder} has no checkpoint yet; make the page again when it has one")
        self.saved = self._read(files[-1])
        self._files = files

    def _read(self, path: Path) -> Saved:
        found = read_encoders(path)
        for encoder in (found.query, found.key):
            if encoder is not None:
                encoder.autocast = _autocast(found.config.trainer.precision, self.device)
                # torch's type hints leave out this argument.
                encoder.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return found

    @property
    def config(self) -> Config:
        return self.saved.config

    @functools.cached_property
    def data(self) -> DataConfig:
        """How images are shown to the encoders: as in the run's evaluation, or else in the size of its views."""
        data = replace(self.config.data, bad_image_limit=1.0)
        if data.eval_size is None and not isinstance(self.train_source, ArraySource):
            side = self.config.views[0].size
            data = replace(data, eval_resize=round(side * 256 / 224), eval_size=side)
        return data

    @functools.cached_property
    def train_source(self) -> Source:
        return imbalanced(build_source(self.config.data, "train"), self.config.data)

    @property
    def has_tests(self) -> bool:
        return self.test_source is not self.train_source

    @property
    def caption(self) -> str:
        """How to read a sheet of test images."""
        frames = "A red frame is another class than that of the image." if self.classes else ""
        tests = "" if self.has_tests else "The run has no test images: other training images take their place."
        return f"{frames} {tests}".strip()

    @functools.cached_property
    def test_source(self) -> Source:
        """The test images; the training images if there are none with the same classes."""
        try:
            found = build_source(self.config.data, "test")
        except UserError:
            return self.train_source
        return found if list(found.classes) == list(self.train_source.classes) else self.train_source

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes; empty without labels."""
        return self.train_source.classes

    @functools.cached_property
    def earlier(self) -> Sequence[Saved]:
        """The checkpoints of the same bank before the newest one, evenly spaced, oldest first."""
        if self.saved.bank is None:
            return []
        chosen = evenly_spaced(len(self._files), self.settings.checkpoints).tolist()
        found = [self._read(self._files[place]) for place in chosen if place != len(self._files) - 1]
        return [saved for saved in found if saved.bank is not None and saved.step < self.saved.step]

    @functools.cached_property
    def train(self) -> Seen:
        """Training images: features [N, D], embeddings [N, C] and keys [N, C], then embeddings of earlier encoders."""
        chosen, _ = self._positions
        keys = [_embedding(self.saved.key)] if self.saved.key is not None and self.saved.bank is not None else []
        return self._see(self.train_source, chosen, SHARES[0], [*keys, *self._earlier_encoders()])

    @functools.cached_property
    def test(self) -> Seen:
        """Test images: features [N, D], embeddings [N, C], features of the random encoder, then as above."""
        _, chosen = self._positions
        return self._see(self.test_source, chosen, SHARES[1], [self._random, *self._earlier_encoders()])

    @functools.cached_property
    def map(self) -> Seen:
        """Images of at most `CLASSES` classes: features [N, D], embeddings, features of the random encoder."""
        if len(self.classes) <= CLASSES:
            return self.test
        source, shown = self.test_source, evenly_spaced(len(self.classes), CLASSES).numpy()
        positions = np.flatnonzero(np.isin(labels_of(source), shown))
        chosen = positions[evenly_spaced(len(positions), self.settings.test_images).numpy()]
        return self._see(source, chosen, SHARES[2], [self._random])

    @functools.cached_property
    def side(self) -> int:
        """Pixels of a thumbnail."""
        source = self.train_source
        # More than a small image has would only cost bytes.
        return SMALL if isinstance(source, ArraySource) and max(source.images.shape[1:3]) <= SMALL else LARGE

    def thumbnail(self, source: Source, index: Tensor | int) -> Image.Image | None:
        """An image as a small square; None: it can't be read."""
        return thumbnail(source, int(index), self.side)

    def keys(self) -> Tensor:
        """The training images by the encoder whose embeddings fill and choose the bank's rows. [N, C]"""
        return self.train.outputs[1 if self.saved.key is None else 2]

    @property
    def chooses(self) -> bool:
        """Whether the nearest row of an image is its positive, as in CaCo."""
        positives = {"caco": "bank", "ablation": self.config.ablation.positives}  # type: ignore[attr-defined]
        return positives.get(self.config.method) == "bank"

    @functools.cached_property
    def counts(self) -> Tensor:
        """How many training images choose each row: the one most similar to their key (eq. 11). [K]"""
        bank = self.saved.bank
        assert bank is not None
        return bank_select(self.keys().to(self.device), bank.to(self.device))[0].bincount(minlength=len(bank)).cpu()

    @functools.cached_property
    def _positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the training and the test images of the sample; of one set, no image is in both."""
        count, settings = len(self.train_source), self.settings
        if self.has_tests:
            tests = evenly_spaced(len(self.test_source), settings.test_images)
            return evenly_spaced(count, settings.train_images).numpy(), tests.numpy()
        if count < 2:
            raise UserError(f"data.path: found {count} image, expected at least 2 for pictures of neighbours")
        tests = evenly_spaced(count, min(settings.test_images, max(1, count // 5)))
        others = np.setdiff1d(np.arange(count), tests.numpy())
        return others[evenly_spaced(len(others), settings.train_images).numpy()], tests.numpy()

    def _see(self, source: Source, positions: np.ndarray, share: float, more: Sequence[Callable]) -> Seen:
        # Shuffled, so that those which are read until the time is over are spread over the set too.
        positions = np.random.default_rng(0).permutation(positions)
        loader = build_eval_loader(
            self.data,
            "sampled",
            batch_size=min(self._batch_size(), len(positions)),
            device=self.device,
            source=take(source, positions),
            labelled=False,
        )
        together = _Together(self.saved.query, more)
        until = _Until(loader, time.monotonic() + share * self.settings.seconds)
        rows, labels, index = (value.cpu() for value in extract_features(together, until, self.device))
        return Seen(source, torch.from_numpy(positions)[index], labels, rows.split(together.widths, dim=1))

    def _batch_size(self) -> int:
        pixels = (self.data.eval_size or SMALL) ** 2
        return BATCH if self.device.type == "cuda" else min(BATCH, max(4, PIXELS // pixels))

    @functools.cached_property
    def _random(self) -> Callable[[Tensor], Tensor]:
        backbone = random_backbone(self.config, self.saved.channels).to(self.device)
        return lambda images: backbone(images)

    def _earlier_encoders(self) -> list[Callable[[Tensor], Tensor]]:
        return [_embedding(saved.query) for saved in self.earlier]


class _Together(nn.Module):
    """Features and embeddings by one encoder, and what others make of the same images, side by side."""

    def __init__(self, query: Encoder, others: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.query, self.others = query, others
        self.widths: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        with self.query.precision(images.device):
            features = self.query.backbone(images)
            embeddings = self.query.projector(features)
        parts = [features, F.normalize(embeddings.float(), dim=1), *(other(images) for other in self.others)]
        self.widths = [part.shape[1] for part in parts]
        return torch.cat([part.float() for part in parts], 1)


class _Until:
    """The batches of a loader until a time; at least one."""

    def __init__(self, loader: EvalLoader, end: float) -> None:
        self.loader, self.end = loader, end

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in self.loader:
            yield batch
            if time.monotonic() > self.end:
                return


def _embedding(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    return lambda images: encoder(images)[0]


def _autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of the run's autocast; None if this device, which may be another one than that of the run, lacks it."""
    try:
        return autocast_dtype(precision, device)
    except UserError:
        return None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that stay for good and the last ones, each of them once, oldest first."""
    steps = [path for _, path in checkpoints_in(folder)]
    milestones = sorted(folder.glob("epoch_*.pt"))
    # A milestone is another name of a step's file, if the file system has links.
    known = {path.stat().st_ino for path in steps}
    return [*(path for path in milestones if path.stat().st_ino not in known), *steps]
