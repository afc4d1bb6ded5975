"""The settings of `caco-fast export`: the architecture of a file that does not say its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from caco_fast.models import BackboneConfig
from caco_fast.settings import section
from caco_fast.settings_tree import read_settings


@dataclass(frozen=True)
class ExportConfig:
    backbone: BackboneConfig = section(BackboneConfig, "architecture of a file that does not say its own")


def architecture_of(settings: Sequence[str]) -> BackboneConfig:
    """The architecture that `key=value` arguments name. UserError for an unknown key or a mistyped value."""
    return read_settings(ExportConfig, overrides=settings).backbone
