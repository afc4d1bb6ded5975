"""From settings to sources and loaders."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence

import torch

from caco_fast.data.cifar10 import cifar10
from caco_fast.data.evaluation import EvalLoader
from caco_fast.data.fashion_mnist import fashion_mnist
from caco_fast.data.folder import FolderSource
from caco_fast.data.index import IndexSource
from caco_fast.data.loader import TrainLoader
from caco_fast.data.settings import DataConfig, ViewConfig
from caco_fast.data.source import ArraySource, Source
from caco_fast.data.torchvision_loader import TorchvisionLoader
from caco_fast.data.webdataset import WebDatasetSource
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

SPLITS = ("train", "test")
MEMORY_LIMIT = 2 * 1024**3  # bytes of pixels, up to which `loader: auto` keeps a set in memory


def build_source(config: DataConfig, split: str) -> Source:
    """The images of a split, "train" or "test". UserError where they are missing or unreadable."""
    config.validate()
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, wanted one of {SPLITS}")
    if config.source == "embedded":
        source: Source = fashion_mnist(split)
    elif config.source == "cifar10":
        source = cifar10(os.path.expanduser(config.path), split)
    elif config.source == "index":
        source = IndexSource(config.path, split, config.root)
    elif config.source == "webdataset":
        source = WebDatasetSource(config.path, split)
    else:
        source = FolderSource(os.path.expanduser(config.path), split)
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) != source.channels:
            raise UserError(f"data.{name} has {len(values)} values, the images have {source.channels} channels")
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
) -> TrainLoader:
    """The loader that `config.loader` names, over the training set; `batch_size` counts the images of all ranks.

    `dtype`: of the views. What the encoder's first convolution computes in spares it a cast, and half of the bytes.
    """
    if not views:
        raise UserError("there are no views; give at least one entry")
    for number, view in enumerate(views):
        view.validate(f"views[{number}]")
    source = build_source(config, "train")
    options = dict(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, device=device, dtype=dtype)
    if config.loader == "memory" or (config.loader == "auto" and _small(source)):
        from caco_fast.data.memory import MemoryLoader

        return MemoryLoader(source, config, views, **options)
    if _by_dali(config):
        from caco_fast.data.dali_loader import DaliLoader

        return DaliLoader(source, config, views, **options)
    if config.loader == "auto" and rank == 0:
        log.info(
            "loading by torchvision, because NVIDIA DALI, which is faster, is not installed; %s", _how_to_install()
        )
    return TorchvisionLoader(source, config, views, **options)


def _small(source: Source) -> bool:
    return isinstance(source, ArraySource) and source.images.nbytes <= MEMORY_LIMIT


def _by_dali(config: DataConfig) -> bool:
    """Whether DALI reads what isn't held in memory. UserError where it is asked for and not installed."""
    if config.loader == "dali" and not _dali_installed():
        raise UserError(f"data.loader is dali, but NVIDIA DALI is not installed; {_how_to_install()}")
    return config.loader in ("auto", "dali") and _dali_installed()


def _dali_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _how_to_install() -> str:
    extra = "dali-cuda12" if (torch.version.cuda or "13").startswith("12.") else "dali-cuda13"
    return f'install it with: pip install "caco-fast[{extra}]"'


def build_eval_loader(
    config: DataConfig,
    split: str,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    share: float = 1.0,
    device: torch.device | str = "cpu",
) -> EvalLoader:
    """The rank's part of a fixed random `share` of a split, in order, with labels. UserError where there are none."""
    source = build_source(config, split)
    if not source.classes:
        raise UserError(
            f"the {split} images of {config.path} have no labels, which kNN and linear evaluation need; "
            f"put them into one folder for each class, or turn evaluation off"
        )
    # An array whose images stay as they are has nothing to decode.
    held = isinstance(source, ArraySource) and config.eval_resize is None
    dali = not held and not (config.loader == "auto" and _small(source)) and _by_dali(config)
    options = dict(batch_size=batch_size, rank=rank, world_size=world_size, share=share, device=device)
    return EvalLoader(source, config, **options, dali=dali)
