"""Images in, batches of views out: sources, the published augmentation, loaders."""

from caco_fast.data.build import build_eval_loader, build_source, build_train_loader
from caco_fast.data.config import DataConfig, ViewConfig, validate_views
from caco_fast.data.loaders.base import Batch, TrainLoader
from caco_fast.data.loaders.evaluation import EvalLoader
from caco_fast.data.sources.base import ArraySource, BadImageError, Source
from caco_fast.data.sources.part import hold_out

__all__ = [
    "ArraySource",
    "BadImageError",
    "Batch",
    "DataConfig",
    "EvalLoader",
    "Source",
    "TrainLoader",
    "ViewConfig",
    "build_eval_loader",
    "build_source",
    "build_train_loader",
    "hold_out",
    "index_main",
    "validate_views",
]


def index_main(arguments: list[str] | None = None) -> int:
    """Check a folder of images and write an index of it; the program of tools/index_data.py. Returns an exit status."""
    # Here, because nothing else needs its progress bar.
    from caco_fast.data.sources.make_index import main

    return main(arguments)
