"""The self-supervised methods, each a file of its own, by the name that a configuration gives them."""

import importlib
import pkgutil

from caco_fast.methods.base import (
    METHODS,
    Embeddings,
    EncoderNeeds,
    Method,
    Phase,
    StepOutput,
    build_method,
    register,
    registered,
)

# Every file registers its method, so that a new one needs no other edit.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from caco_fast.methods.adco import AdCo, AdCoConfig  # noqa: E402
from caco_fast.methods.caco import CaCo, CaCoConfig, CaCoLoss  # noqa: E402
from caco_fast.methods.moco import MoCo, MoCoConfig  # noqa: E402

__all__ = [
    "METHODS",
    "AdCo",
    "AdCoConfig",
    "CaCo",
    "CaCoConfig",
    "CaCoLoss",
    "Embeddings",
    "EncoderNeeds",
    "Method",
    "MoCo",
    "MoCoConfig",
    "Phase",
    "StepOutput",
    "build_method",
    "register",
    "registered",
]
