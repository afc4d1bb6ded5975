"""The whole configuration of a run: every component's own settings, from YAML and `key=value` arguments."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from caco_fast.data import DataConfig, ViewConfig
from caco_fast.engine.metrics import WandbConfig
from caco_fast.engine.settings import CheckpointConfig, RunConfig, TrainerConfig
from caco_fast.evaluate.evaluator import EvaluationConfig
from caco_fast.methods import METHODS, registered
from caco_fast.methods.base import Registered
from caco_fast.models import BackboneConfig, ProjectorConfig
from caco_fast.optim import OptimizerConfig, ScheduleConfig
from caco_fast.settings import section, setting
from caco_fast.settings_tree import describe, flat_settings, from_yaml, read_settings, settings_of, to_yaml, with_bases

__all__ = [
    "Config",
    "config_class",
    "config_from_yaml",
    "describe",
    "flat_settings",
    "load_config",
    "settings_of",
    "to_yaml",
]


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each section belongs to the component that it configures.

    An object also has a section for every registered method, by the method's name: see `config_class`.
    """

    method: str = setting("caco", "name of the method; the section of that name configures it")
    data: DataConfig = section(DataConfig, "images and their loader")
    views: list[ViewConfig] = setting([ViewConfig(count=2)], "how views are drawn; caco: two large ones first")
    backbone: BackboneConfig = section(BackboneConfig, "the encoder that is kept")
    projector: ProjectorConfig = section(ProjectorConfig, "the head that is trained with it")
    optimizer: OptimizerConfig = section(OptimizerConfig, "the encoder's optimiser")
    schedule: ScheduleConfig = section(ScheduleConfig, "learning rates and EMA momentum over the run")
    trainer: TrainerConfig = section(TrainerConfig, "length, batch, precision, device")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "what is kept to resume from")
    evaluation: EvaluationConfig = section(EvaluationConfig, "kNN during the run, linear probe at its end")
    run: RunConfig = section(RunConfig, "the run folder and what is written there")
    wandb: WandbConfig = section(WandbConfig, "Weights & Biases")

    def __post_init__(self) -> None:
        registered(self.method)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of an object is made when it is needed, so pickle can't find it by name.
        return config_from_yaml, (to_yaml(self),)


def config_class() -> type[Config]:
    """Config with a section for each method that is registered by now."""
    return _with_sections(tuple(METHODS.items()))


@functools.lru_cache
def _with_sections(methods: tuple[tuple[str, Registered], ...]) -> type[Config]:
    fields = [(name, entry.config, section(entry.config, entry.help)) for name, entry in methods]
    return dataclasses.make_dataclass("Config", fields, bases=(Config,), frozen=True)


def load_config(
    path: Path | str | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """The defaults, then the YAML file, then `key=value` overrides such as `optimizer.lr=0.1` or `views.0.size=160`.

    `defaults`, such as {"optimizer.lr": 0.1}, take the place of the program's own.
    `path` is a file or the name of a shipped configuration. It may begin with `base: NAME`, a file next to it or a
    shipped configuration, whose settings it changes.

    Raises:
        UserError: a missing or malformed file, an unknown key (the nearest valid one is named), a mistyped value.
    """
    kind = config_class()
    files = with_bases(path, kind) if path is not None else []
    _require_method(files, overrides)
    return read_settings(kind, files, overrides, defaults, str(path) if path is not None else "settings")


def config_from_yaml(text: str) -> Config:
    """The Config that `to_yaml` wrote."""
    return from_yaml(text, config_class(), "saved settings")


def _require_method(files: Sequence[tuple[Path, dict[str, Any]]], overrides: Sequence[str]) -> None:
    """Raise UserError for an unknown method, before its section is called an unknown setting."""
    names = [given["method"] for _, given in files if isinstance(given.get("method"), str)]
    names += [override.removeprefix("method=") for override in overrides if override.startswith("method=")]
    if names and "${" not in names[-1]:
        registered(names[-1])
