"""The parts of a run's page that need its encoder, its bank and its images."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from caco_fast.report.bank import bank_part
from caco_fast.report.blocks import guarded
from caco_fast.report.map import map_part
from caco_fast.report.neighbours import neighbours_part
from caco_fast.report.parts import Part
from caco_fast.report.sample import PicturesConfig, Sample
from caco_fast.report.surrogates import surrogates_part
from caco_fast.report.views import views_part

__all__ = ["PicturesConfig", "picture_parts"]


def picture_parts(folder: Path, settings: PicturesConfig, device: torch.device) -> Iterator[Part]:
    """The parts, from the newest checkpoint of a run folder. Those of a bank are left out if the method has none.

    Nothing here is collective, and nothing is raised: what can't be made is a `Missing` with the reason.
    """
    made: list[Sample] = []

    def read() -> list:
        made.append(Sample(folder, settings, device))
        return []

    if missing := guarded(read, "pictures"):
        yield Part("pictures", "Pictures", missing)
        return
    (sample,) = made
    parts: list[Callable[[Sample], Part]] = [neighbours_part, map_part, views_part]
    if sample.saved.bank is not None:
        parts = [bank_part, surrogates_part, *parts]
    for make in parts:
        yield make(sample)
