"""The interface of an export format, and what every export does: refuse, write, read back, compare, and only then name.

A format is two functions: `write(pretrained, path)` and `verify(pretrained, path)`, which reads the file back by the
library it is for, where that is installed, and returns the largest difference. `register` gives it its name.

Legend: B images, D feature size.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from caco_fast.errors import UserError
from caco_fast.models.layouts import COUNTER
from caco_fast.pretrained import Pretrained
from caco_fast.storage import sync_folder

# Of the largest feature: what two orders of the same sums in f32 may differ by.
TOLERANCE = 1e-4
IMAGENET_SIDE = 224
INSTEAD = "take safetensors, lightly or onnx instead"


class Exported(NamedTuple):
    """What an export has written."""

    path: Path
    # Between the features of the backbone and of what was read back, as a share of the largest feature.
    difference: float


@dataclass(frozen=True)
class Format:
    write: Callable[[Pretrained, Path], None]
    verify: Callable[[Pretrained, Path], float]
    help: str
    # What the name of the file may end with; none: a folder.
    endings: tuple[str, ...]


FORMATS: dict[str, Format] = {}


def register(
    name: str,
    write: Callable[[Pretrained, Path], None],
    verify: Callable[[Pretrained, Path], float],
    help: str,
    endings: tuple[str, ...] = (),
) -> None:
    """Add a format."""
    FORMATS[name] = Format(write, verify, help, endings)


def export(pretrained: Pretrained, name: str, out: Path, *, force: bool = False) -> Exported:
    """Write a backbone in the format of this name to `out`, once it was read back and found equal.

    force: whether an existing `out` is replaced.

    Raises:
        UserError: the format can't hold the backbone, `out` exists or can't be written, or what was read back differs.
            Then `out` is as it was.
    """
    if name not in FORMATS:
        raise UserError(f"FORMAT: found '{name}', expected one of {', '.join(FORMATS)}")
    kind, out = FORMATS[name], Path(out).expanduser()
    _require_place(name, kind, out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the place, so that one rename puts it there.
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            made = Path(scratch) / out.name
            with torch.no_grad():
                kind.write(pretrained, made)
                difference = kind.verify(pretrained, made)
            # NaN is a difference too.
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{name}: what was read back from {out.name} differs by {difference:.1e} of the largest feature, "
                    f"expected at most {TOLERANCE:.0e}; nothing was written, please report this"
                )
            _put(made, out, Path(scratch))
    except OSError as error:
        raise UserError(f"OUT: {out} can't be written: {error.strerror or error}; make room, or take another") from None
    return Exported(out, difference)


def _require_place(name: str, kind: Format, out: Path, force: bool) -> None:
    if kind.endings and out.suffix not in kind.endings:
        raise UserError(f"OUT: found {out}, expected a name that ends with {' or '.join(kind.endings)} for {name}")
    if not out.exists():
        return
    if not force:
        raise UserError(f"OUT: {out} exists; take another name, or replace it with --force")
    # A folder that this program did not write may hold anything.
    if out.is_dir() and not (not kind.endings and (not any(out.iterdir()) or (out / _MARKS[name]).is_file())):
        raise UserError(
            f"OUT: {out} is a folder that {name} did not write, and --force does not remove it; take another"
        )


# A file that a folder of this format has.
_MARKS = {"hub": "model.safetensors", "detectron2": "model.pkl"}


def _put(made: Path, out: Path, scratch: Path) -> None:
    """Give `out` the contents of `made`, durably; a folder that is replaced is gone only after that."""
    os.umask(mask := os.umask(0))
    for path in [made, *(made.rglob("*") if made.is_dir() else ())]:
        if path.is_file():
            # safetensors makes its files readable by their owner alone.
            path.chmod(0o666 & ~mask)
            with open(path, "rb") as file, suppress(OSError):
                os.fsync(file.fileno())
    before = scratch / f"{out.name}.before"
    if out.is_dir():
        os.replace(out, before)
    os.replace(made, out)
    sync_folder(out.parent)
    if before.exists():
        shutil.rmtree(before)


def tensors_of(pretrained: Pretrained) -> dict[str, Tensor]:
    """The backbone's tensors by their names, each with a storage of its own."""
    return {name: value.detach().clone().contiguous() for name, value in pretrained.backbone.state_dict().items()}


def image_side(pretrained: Pretrained) -> int:
    """Side of the images in pixels that the backbone was trained or is evaluated on."""
    config = pretrained.config
    if config is not None:
        return config.data.eval_size or config.views[0].size
    side = pretrained.architecture.options.get("img_size")
    size = getattr(pretrained.backbone, "pretrained_cfg", {}).get("input_size", (3, IMAGENET_SIDE, IMAGENET_SIDE))
    return int(side) if isinstance(side, int) else int(size[-1])


def probe(pretrained: Pretrained, count: int = 3) -> Tensor:
    """Images to compare features on, the same every time. -> [B, channels, h, w]"""
    side = image_side(pretrained)
    return torch.randn(count, pretrained.channels, side, side, generator=torch.Generator().manual_seed(0))


def largest_difference(pretrained: Pretrained, read_back: Callable[[Tensor], Tensor], count: int = 3) -> float:
    """The largest difference of features between a backbone and what was read back, as a share of the largest one."""
    images = probe(pretrained, count)
    features, found = pretrained.backbone(images), read_back(images)
    if features.shape != found.shape:
        return float("inf")
    return float((features - found).abs().max() / features.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def require_same(name: str, pretrained: Pretrained, target: nn.Module, classifiers: tuple[str, ...] = ()) -> None:
    """Raise UserError if an architecture of another library has other tensors than the backbone.

    classifiers: what the names of its further tensors may begin with.
    """
    own = {key: value.shape for key, value in pretrained.backbone.state_dict().items()}
    theirs = {key: value.shape for key, value in target.state_dict().items() if not key.startswith(classifiers)}
    different = [key for key in {**theirs, **own} if own.get(key) != theirs.get(key) and not key.endswith(COUNTER)]
    if different:
        key = different[0]
        found, expected = (list(shapes[key]) if key in shapes else "none" for shapes in (own, theirs))
        architecture = pretrained.architecture.name
        raise UserError(
            f"{name}: can't hold this {architecture}: {len(different)} tensors differ from {name}'s, such as {key} "
            f"(found {found}, expected {expected}); {INSTEAD}"
        )


def require_own_stem(name: str, pretrained: Pretrained) -> None:
    """Raise UserError for a stem that only this package can build."""
    stem = pretrained.architecture.stem
    if stem != "imagenet":
        raise UserError(f"{name}: can't hold the stem '{stem}', whose first layers {name} doesn't build; {INSTEAD}")
