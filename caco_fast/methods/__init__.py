"""The self-supervised objectives, by the name that a config gives them."""

from collections.abc import Callable
from typing import Any

from caco_fast.methods.base import Method, StepOutput
from caco_fast.methods.caco import CaCo, CaCoConfig, CaCoLoss
from caco_fast.methods.moco import MoCo, MoCoConfig

# Each is built from its own settings and the embedding size; the config section carries the same name.
METHODS: dict[str, Callable[[Any, int], Method]] = {"caco": CaCo, "moco": MoCo}

__all__ = ["METHODS", "CaCo", "CaCoConfig", "CaCoLoss", "Method", "MoCo", "MoCoConfig", "StepOutput"]
