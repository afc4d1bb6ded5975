"""The part of the training images whose labels a low-shot protocol may use: a published list, n a class, or a share."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from caco_fast.data import Source
from caco_fast.data.sources.part import first_of_classes, labels_of, take
from caco_fast.errors import UserError

SHOWN = 3


def labelled_part(
    source: Source, *, file: str, per_class: int | None, share: float | None, seed: int, name: str
) -> Source:
    """The images that one of `file`, `per_class` and `share` chooses.

    Raises:
        UserError: a class has too few images or none, or the file names images that are not there.
    """
    labels = labels_of(source)
    if file:
        positions = _listed(source, Path(file).expanduser(), name)
    else:
        positions = _drawn(source, labels, per_class, share, seed, name)
    found = np.bincount(labels[positions], minlength=len(source.classes))
    if (empty := np.flatnonzero(found == 0)).size:
        which = ", ".join(source.classes[label] for label in empty[:SHOWN])
        raise UserError(
            f"{name}: found no labelled image of {empty.size} of {len(source.classes)} classes ({which}), expected at "
            "least one of each; give more labels"
        )
    return take(source, np.sort(positions))


def _drawn(
    source: Source, labels: np.ndarray, per_class: int | None, share: float | None, seed: int, name: str
) -> np.ndarray:
    """Positions of the first images of each class in a shuffle that the seed decides; fewer labels are part of more."""
    order = np.random.default_rng([seed % 2**64, 0x4C4F57]).permutation(len(source))
    counts = np.bincount(labels, minlength=len(source.classes))
    if per_class is not None:
        if (short := np.flatnonzero(counts < per_class)).size:
            raise UserError(
                f"{name}.per_class: found {per_class}, expected no more than the {counts[short[0]]} images of class "
                f"{source.classes[short[0]]}"
            )
        kept = np.full_like(counts, per_class)
    else:
        kept = np.minimum(counts, np.maximum(1, np.round(counts * (share or 0.0)).astype(np.int64)))
    return first_of_classes(labels, order, kept)


def _listed(source: Source, file: Path, name: str) -> np.ndarray:
    """Positions of the images that a file names, one a line, by the name or by class/name."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"{name}.labels: {file} can't be read: {reason}") from None
    positions: dict[str, list[int]] = defaultdict(list)
    wanted = {line.count("/") for line in lines}
    for position in range(len(source)):
        parts = source.name(position).split("/")
        for depth in wanted:
            positions["/".join(parts[-1 - depth :])].append(position)
    missing = [line for line in lines if line not in positions]
    unclear = [line for line in lines if len(positions.get(line, [])) > 1]
    twice = len(lines) - len(set(lines))
    for lines_of, what in ((missing, "not among the training images"), (unclear, "the name of several images")):
        if lines_of:
            raise UserError(
                f"{name}.labels: {len(lines_of)} of {len(lines)} names of {file} are {what}, such as "
                f"{', '.join(lines_of[:SHOWN])}; write CLASS/NAME, or take the list of this data set"
            )
    if twice or not lines:
        raise UserError(f"{name}.labels: {file} has {len(lines)} names, {twice} of them again; expected each once")
    return np.array([positions[line][0] for line in lines], dtype=np.int64)
