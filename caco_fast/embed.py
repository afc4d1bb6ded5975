"""Features of anyone's own images: a row for each image that can be read, with its file name.

Legend: N images, R of them can be read, D feature size.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from caco_fast.data import DataConfig
from caco_fast.data.sources.base import SUFFIXES, FileSource, Names, data_directory
from caco_fast.data.sources.listing import list_images
from caco_fast.distributed import barrier
from caco_fast.engine.agreement import on_rank_0, require_equal_starts, together
from caco_fast.engine.launch import launched
from caco_fast.engine.precision import prepare_frozen
from caco_fast.engine.progress import log_to_console
from caco_fast.engine.settings import PRECISIONS
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig
from caco_fast.pretrained import Pretrained, open_source
from caco_fast.protocols import Context
from caco_fast.settings import require_at_least, section, setting
from caco_fast.settings_tree import settings_of
from caco_fast.storage import atomic_write, atomic_write_text

FORMATS = (".safetensors", ".npy", ".csv")
# Rows that are written at a time.
BLOCK = 4096
# Bytes of a safetensors header, of which the format allows 100 MB.
HEADER = 90_000_000

log = logging.getLogger("caco_fast.features")


@dataclass(frozen=True)
class EmbedConfig:
    data: str = setting("", "directory of the images: every image below it, flat or nested")
    out: str = setting("", "file to write: NAME.safetensors, NAME.npy (with the names in NAME.txt) or NAME.csv")
    normalise: bool = setting(False, "scale every feature to length 1, as for cosine similarity")
    backbone: BackboneConfig = section(BackboneConfig, "architecture of a file that does not say its own")
    size: int | None = setting(None, "side of the centre crop in pixels; null: that of the run, or 224")
    resize: int | None = setting(
        None, "pixels of the shorter side before the crop; null: that of the run, or size x 8 / 7"
    )
    mean: list[float] | None = setting(None, "mean of each channel in [0, 1]; null: the source's own, or ImageNet's")
    std: list[float] | None = setting(None, "standard deviation of each channel; null: as for the mean")
    precision: str = setting("auto", "precision of the backbone: f32, tf32, bf16, fp16, or auto: as in training")
    batch_size: int = setting(256, "images per forward on each rank")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; under torchrun each rank takes its own GPU")
    workers: int | None = setting(None, "processes of each rank that read images; null: one per core, up to 12")
    max_pixels: int = setting(178_956_970, "an image with more pixels than this is left out (>= 1)")
    cpu_threads: int = setting(0, "threads of CPU operations on each rank; 0: OMP_NUM_THREADS, or cores / local ranks")
    deterministic: bool = setting(False, "the same features bit for bit on a GPU too, at a cost")
    collective_timeout: int = setting(600, "seconds that a rank waits for the others before the program ends")

    def __post_init__(self) -> None:
        if self.out and Path(self.out).suffix not in FORMATS:
            raise UserError(f"out: found '{self.out}', expected a file name that ends with {', '.join(FORMATS)}")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision: found '{self.precision}', expected one of {', '.join(PRECISIONS)}")
        least = {"size": 1, "resize": 1, "batch_size": 1, "workers": 0, "max_pixels": 1, "collective_timeout": 1}
        for name, value in least.items():
            if (found := getattr(self, name)) is not None:
                require_at_least(name, found, value)

    def require_places(self) -> None:
        """Raise UserError if it is not said what to read or what to write."""
        if not self.data:
            raise UserError("data: found nothing, expected the directory of the images; set data=DIR")
        if not self.out:
            raise UserError(f"out: found nothing, expected a file name with one of {', '.join(FORMATS)}; set out=FILE")


class Embedded(NamedTuple):
    """What was written."""

    path: Path
    images: int
    width: int
    bad: dict[str, str]  # relative name -> reason of the images that were left out


def embed(source: str, config: EmbedConfig, trust: bool = False) -> Embedded:
    """Write the features of all images below `config.data`, in the order of their names.

    What is computed is kept in a folder next to the output until that is written, so the same call continues. Under
    torchrun every rank calls it. An older output is replaced. trust: whether pickled classes in a file of weights are
    loaded, which runs code of it.

    Raises:
        UserError: no such source, no images, none that can be read, or an output that can't be written.
        RankLost, ReportedElsewhere: another rank failed; see engine/ranks.py.
    """
    config.require_places()
    out = Path(config.out).expanduser()
    with launched(config, section="") as device:
        log_to_console()
        require_equal_starts({"source": source, **settings_of(config)}, "start all ranks with the same settings")
        on_rank_0(lambda: _require_folder(out))
        pretrained = together(lambda: open_source(source, config.backbone, trust=trust))
        images = together(lambda: list_source(config, pretrained))
        _, autocast = prepare_frozen(config.precision, device, config.deterministic)
        context = Context(
            pretrained,
            together(lambda: data_config(config, pretrained)),
            device=device,
            autocast=autocast,
            batch_size=config.batch_size,
            seed=0,
            folder=out.parent.absolute(),
            cache=Path(f".{out.name}.features"),
        )
        found = context.all_features("given", images, labelled=False)
        shown = [os.fsdecode(images.names[position]) for position in found.index.tolist()]
        root = f"{images.root}{os.sep}"
        bad = {name.removeprefix(root): reason for name, reason in found.bad.items()}
        on_rank_0(lambda: _write(out, found.features, shown, bad, config.normalise))
        # Rank 0 alone removes what all ranks have mapped.
        barrier()
        on_rank_0(lambda: shutil.rmtree(context.cache, ignore_errors=True) if context.cache else None)
        return Embedded(out, len(shown), found.features.shape[1], bad)


def list_source(config: EmbedConfig, pretrained: Pretrained) -> FileSource:
    """Every image below the directory, by name; train/, val/ and folders of classes are folders like others."""
    root = data_directory(config.data, "a directory with images in it", key="data")
    listing = list_images(root)
    listing.report()
    if not listing.names:
        raise UserError(f"data: found no images in {root}, expected files of {', '.join(SUFFIXES)}")
    if pretrained.channels not in (1, 3):
        raise UserError(f"source: found a backbone of {pretrained.channels} channels, expected 1 or 3")
    names = Names.of(map(os.fsencode, listing.names))
    source = FileSource(root, names, np.full(len(names), -1, dtype=np.int32), [])
    source.max_pixels = config.max_pixels
    return source


def data_config(config: EmbedConfig, pretrained: Pretrained) -> DataConfig:
    """How images are read: as the run's own evaluation does it, or as ImageNet's."""
    run, mean, std = pretrained.config, pretrained.mean, pretrained.std
    size, resize = 224, None
    if run is not None:
        # Without a crop of its own a run evaluates whole images, of the size of its views.
        size = run.data.eval_size or max(view.size for view in run.views)
        resize = run.data.eval_resize or (None if run.data.eval_size else size)
    if config.size is not None:
        size, resize = config.size, None
    return DataConfig(
        path=config.data,
        workers=config.workers,
        eval_size=size,
        eval_resize=config.resize or resize or round(size * 8 / 7),
        mean=config.mean or (list(mean) if mean else None),
        std=config.std or (list(std) if std else None),
        max_pixels=config.max_pixels,
    )


def _require_folder(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: can't make {out.parent}: {error.strerror}; set out=FILE") from None
    if out.is_dir():
        raise UserError(f"out: {out} is a directory, expected a file name; set out=FILE")


def _write(out: Path, features: Tensor, names: list[str], bad: dict[str, str], normalise: bool) -> None:
    """Write names and features [R, D] as f32 in the format of the suffix, and the list of images left out."""
    listed = out.with_name(f"{out.stem}.unreadable.txt")
    shown = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]
    try:
        {".safetensors": _safetensors, ".npy": _npy, ".csv": _csv}[out.suffix](out, features, shown, normalise)
        if bad:
            atomic_write_text(listed, "".join(f"{name}: {reason}\n" for name, reason in bad.items()))
        else:
            listed.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"out: can't write {out}: {error.strerror}; free some space, or set out=FILE; the same command continues"
        ) from None
    log.info("%s: %d images, %d features each", out, len(names), features.shape[1])
    if bad:
        log.warning("%d images can't be read and are left out: %s has their names", len(bad), listed)


def _blocks(features: Tensor, normalise: bool) -> Iterator[np.ndarray]:
    for rows in features.split(BLOCK):
        yield (F.normalize(rows.float(), dim=1) if normalise else rows.float()).numpy()


def _safetensors(out: Path, features: Tensor, names: list[str], normalise: bool) -> None:
    """One tensor `features` [R, D], and the names as a JSON list in the metadata."""
    size = 4 * features.numel()
    tensor = {"dtype": "F32", "shape": list(features.shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"names": json.dumps(names)}, "features": tensor}).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > HEADER:
        raise UserError(f"out: found {len(names)} names, too many for safetensors; set out={out.with_suffix('.npy')}")
    with atomic_write(out) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for rows in _blocks(features, normalise):
            file.write(rows.astype("<f4").tobytes())


def _npy(out: Path, features: Tensor, names: list[str], normalise: bool) -> None:
    """An array [R, D], and the names in a .txt, one to a line."""
    with atomic_write(out) as file:
        shape = {"descr": "<f4", "fortran_order": False, "shape": tuple(features.shape)}
        np.lib.format.write_array_header_1_0(file, shape)
        for rows in _blocks(features, normalise):
            file.write(rows.astype("<f4").tobytes())
    atomic_write_text(out.with_suffix(".txt"), "".join(name.replace("\n", "\\n") + "\n" for name in names))


def _csv(out: Path, features: Tensor, names: list[str], normalise: bool) -> None:
    """A line for each image: its name, then the values, with as many digits as f32 has."""
    with atomic_write(out) as file:
        file.write((",".join(["name", *(f"f{i}" for i in range(features.shape[1]))]) + "\n").encode())
        given = iter(names)
        for rows in _blocks(features, normalise):
            for row in rows:
                name = next(given).replace('"', '""')
                file.write((f'"{name}",' + ",".join(f"{value:.9g}" for value in row) + "\n").encode())
