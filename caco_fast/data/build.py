"""Sources and loaders, built from the settings."""

import importlib.util
import logging
from collections.abc import Sequence

import torch

from caco_fast.data.config import NO_EVALUATION, DataConfig, ViewConfig, validate_views
from caco_fast.data.loaders.base import TrainLoader, evaluation_share
from caco_fast.data.loaders.evaluation import EvalLoader, check_sizes
from caco_fast.data.loaders.torchvision import TorchvisionLoader
from caco_fast.data.sources.arrays import OWN_PIXELS, cifar10, cifar100, fashion_mnist
from caco_fast.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, ArraySource, FileSource, Source
from caco_fast.data.sources.folder import FolderSource
from caco_fast.data.sources.index import IndexSource
from caco_fast.data.sources.part import imbalanced
from caco_fast.data.sources.tree import images_of
from caco_fast.data.sources.webdataset import WebDatasetSource
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

SPLITS = ("train", "test")
MEMORY_LIMIT = 2 * 1024**3  # bytes of pixels, up to which `loader: auto` keeps a set in memory


def pixels_of(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels that the images of these settings are normalised by; no image is read."""
    mean, std = OWN_PIXELS.get(config.source, (IMAGENET_MEAN, IMAGENET_STD))
    return tuple(config.mean or mean), tuple(config.std or std)


def build_source(config: DataConfig, split: str) -> Source:
    """The images of a split, "train" or "test". UserError if they are missing or unreadable.

    Listing a large set takes time, so build the source once and give it to `build_train_loader`, `build_eval_loader`.
    """
    config.validate()
    if split not in SPLITS:
        raise ValueError(f"split: found {split!r}, expected one of {SPLITS}")
    if config.source == "embedded":
        return fashion_mnist(split)
    if config.source == "cifar10":
        return cifar10(config.path, split)
    if config.source == "cifar100":
        return cifar100(config.path, split)
    source: FileSource | WebDatasetSource
    if config.source == "index":
        source = IndexSource(config.path, split, config.root)
    else:
        sources = {"webdataset": WebDatasetSource, "folder": FolderSource, "images": images_of}
        source = sources[config.source](config.path, split)
    source.max_pixels = config.max_pixels
    return source


def build_train_loader(
    config: DataConfig,
    views: Sequence[ViewConfig],
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    source: Source | None = None,
) -> TrainLoader:
    """The loader that `config.loader` names, over the training set or the part of it that `config.imbalance` leaves.

    `batch_size` counts the images of all ranks.
    `dtype` is the dtype of the views. The dtype of the encoder's first convolution spares it a cast, and half of the
    bytes. `source` holds the training images, if they are listed already; None: they are listed here.
    """
    validate_views(views)
    source = imbalanced(_source(config, "train", source), config)
    options = dict(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, device=device, dtype=dtype)
    if config.loader == "memory" or (config.loader == "auto" and _small(source)):
        from caco_fast.data.loaders.in_memory import MemoryLoader

        return MemoryLoader(source, config, views, **options)
    if _by_dali(config, source):
        # Here, because DALI need not be installed.
        from caco_fast.data.loaders.dali import DaliLoader

        return DaliLoader(source, config, views, **options)
    if config.loader == "auto" and rank == 0 and not _dali_installed():
        log.info(
            "loading by torchvision, because NVIDIA DALI, which is faster, is not installed; %s", _how_to_install()
        )
    return TorchvisionLoader(source, config, views, **options)


def build_eval_loader(
    config: DataConfig,
    split: str,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    share: float = 1.0,
    device: torch.device | str = "cpu",
    source: Source | None = None,
    labelled: bool = True,
) -> EvalLoader:
    """The rank's part of a fixed random `share` of a split, in order, with labels.

    UserError if there are no labels, unless they are not needed: `labelled` is false, and then each is -1.

    `source` holds the images of the split, if they are listed already; None: they are listed here.
    """
    source = _source(config, split, source)
    if labelled and not source.classes:
        raise UserError(
            f"the {split} images of {config.path} have no labels, which kNN and linear evaluation need; "
            f"put them into one folder for each class, set evaluation.held_out=0.05 for the loss on held-out images, "
            f"or {NO_EVALUATION}"
        )
    if batch_size > 1:
        # Every rank looks at the same images, so that all of them refuse.
        check_sizes(source, config, evaluation_share(len(source), share, 0, 1))
    # An array whose images stay as they are has nothing to decode.
    held = isinstance(source, ArraySource) and config.eval_resize is None
    # DALI's cubic filter is not PIL's.
    by_pil = held or config.eval_interpolation != "bilinear"
    dali = not by_pil and not (config.loader == "auto" and _small(source)) and _by_dali(config, source)
    options = dict(batch_size=batch_size, rank=rank, world_size=world_size, share=share, device=device)
    return EvalLoader(source, config, **options, dali=dali)


def _source(config: DataConfig, split: str, source: Source | None) -> Source:
    """`source`, checked against the settings, or the source that the settings name."""
    if source is None:
        return build_source(config, split)
    config.validate(needs_path=False)
    config.validate_channels(source.channels)
    return source


def _small(source: Source) -> bool:
    return isinstance(source, ArraySource) and source.images.nbytes <= MEMORY_LIMIT


def _by_dali(config: DataConfig, source: Source) -> bool:
    """Whether DALI reads the images that are not in memory. UserError if it is asked for and not installed."""
    if config.loader == "dali" and not _dali_installed():
        raise UserError(f"data.loader: found dali, but NVIDIA DALI is not installed; {_how_to_install()}")
    return config.loader in ("auto", "dali") and not getattr(source, "by_pil", False) and _dali_installed()


def _dali_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _how_to_install() -> str:
    extra = "dali-cuda12" if (torch.version.cuda or "13").startswith("12.") else "dali-cuda13"
    return f'install it with: pip install "caco-fast[{extra}]"'
