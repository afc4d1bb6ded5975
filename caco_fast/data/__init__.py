"""Images in, batches of views out: sources, the published augmentation, loaders."""

from caco_fast.data.build import build_eval_loader, build_source, build_train_loader
from caco_fast.data.evaluation import EvalLoader
from caco_fast.data.loader import Batch, TrainLoader
from caco_fast.data.settings import DataConfig, ViewConfig
from caco_fast.data.source import ArraySource, BadImageError, Source

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
]
