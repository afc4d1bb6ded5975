"""Evaluation protocols that papers publish, each a file of its own, by the name that the command line gives them."""

import importlib
import pkgutil

from caco_fast.protocols.base import PROTOCOLS, Context, Published, Result, register, registered
from caco_fast.protocols.features import AugmentedView, FeatureSet

# Every file registers its protocol, so that a new one needs no other edit.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["PROTOCOLS", "AugmentedView", "Context", "FeatureSet", "Published", "Result", "register", "registered"]
