"""Published presets of a protocol, and settings of which a user gives only those that differ from the preset.

A protocol's `Recipe` is a dataclass in which every field has a value. `overridable` makes the settings from it, in
which every field may be null: the preset's. The presets are the files of `caco_fast/configs/evaluation/<folder>/`.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from caco_fast.configs import FOLDER
from caco_fast.distributed import world_size
from caco_fast.errors import UserError
from caco_fast.optim import Schedule, ScheduleConfig
from caco_fast.pretrained import Pretrained
from caco_fast.settings import require_at_least, setting
from caco_fast.settings_tree import read_settings, with_bases

log = logging.getLogger("caco_fast.evaluation")

RecipeType = TypeVar("RecipeType", bound="TrainingRecipe")
SCALINGS = {"none": lambda batch: 1.0, "linear": lambda batch: batch / 256, "sqrt": lambda batch: batch**0.5}


@dataclasses.dataclass(frozen=True)
class TrainingRecipe:
    """What every preset says of the optimiser and its schedule."""

    epochs: int = setting(100, "epochs of training")
    batch_size: int = setting(256, "images of a step, over all ranks")
    momentum: float = setting(0.9, "momentum of the optimiser")
    nesterov: bool = setting(False, "Nesterov's form of the momentum")
    trust: float = setting(0.001, "trust coefficient of larc or lars")
    weight_decay: float = setting(0.0, "weight decay")
    lr: float = setting(0.1, "learning rate of the headline, before lr_scaling")
    lr_scaling: str = setting(
        "none", "learning rates are multiplied by: none 1, linear batch / 256, sqrt root of batch"
    )
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up")
    final_ratio: float = setting(0.0, "the cosine ends at this share of the learning rate")
    milestones: list[int] = setting([], "epochs after which the learning rate is multiplied; empty: a cosine")
    milestone_factor: float = setting(0.1, "factor of the learning rate at each milestone")
    per: str = setting("epoch", "step or epoch: how often the learning rate changes")
    init_std: float = setting(0.01, "deviation of the classifier's first weights; its bias is 0")
    crop_scale: list[float] = setting([0.08, 1.0], "share of the image that a training crop covers: smallest, largest")
    flip_p: float = setting(0.5, "probability of a horizontal flip")
    interpolation: str = setting("bilinear", "how test images are resized: bilinear or bicubic")

    def __post_init__(self) -> None:
        require_at_least("epochs", self.epochs, 1)
        require_at_least("batch_size", self.batch_size, 1)
        for name in ("lr", "trust", "init_std"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")
        _require("nesterov", self.nesterov, self.momentum > 0 or not self.nesterov, "false without momentum")
        _require("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        _require("lr_scaling", self.lr_scaling, self.lr_scaling in SCALINGS, f"one of {', '.join(SCALINGS)}")
        _require("interpolation", self.interpolation, self.interpolation in ("bilinear", "bicubic"), "that or bicubic")
        low, high = self.crop_scale if len(self.crop_scale) == 2 else (0.0, 0.0)
        _require("crop_scale", self.crop_scale, 0 < low <= high <= 1, "[low, high] with 0 < low <= high <= 1")
        _require("flip_p", self.flip_p, 0 <= self.flip_p <= 1, "a probability")
        self.schedule(1)

    def schedule(self, steps_per_epoch: int) -> Schedule:
        """The factor of every learning rate."""
        config = ScheduleConfig(
            warmup_epochs=self.warmup_epochs,
            final_ratio=self.final_ratio,
            milestones=list(self.milestones),
            milestone_factor=self.milestone_factor,
            per=self.per,
        )
        return Schedule(config, 1.0, self.epochs, steps_per_epoch)

    def scaled(self, lr: float) -> float:
        """The learning rate that a setting of it means at this batch size."""
        return lr * SCALINGS[self.lr_scaling](self.batch_size)


class Chosen(NamedTuple):
    """A recipe with the user's settings, and where it differs from the preset."""

    recipe: Any
    preset: str
    deviations: dict[str, Any]


def preset_names(folder: str) -> list[str]:
    return sorted(path.stem for path in _folder(folder).glob("*.yaml"))


def preset_of(pretrained: Pretrained, folder: str, otherwise: str) -> str:
    """The preset of the method of a run, or of the framework that trained the weights, or `otherwise`."""
    framework = pretrained.config.method if pretrained.config else str(pretrained.origin.get("framework"))
    plain = "".join(letter for letter in framework.lower() if letter.isalnum())
    names = {name.partition("_")[0] for name in preset_names(folder)}
    # The longest name first, so that MoCo v3 is not taken for MoCo.
    fitting = sorted((name for name in names if plain.startswith(name)), key=len)
    return fitting[-1] if fitting else otherwise


def overridable(recipe: type, name: str, folder: str, **further: tuple[Any, Any]) -> type:
    """The settings of a protocol: `preset`, further fields, and each field of `recipe`, null if it is the preset's.

    Wrong values are refused when the settings are made. further: type and `setting` of each.
    """

    def check(self: Any) -> None:
        names = preset_names(folder)
        if self.preset and not {self.preset, f"{self.preset}_1percent"} & set(names):
            raise UserError(f"{name}.preset: found '{self.preset}', expected one of {', '.join(names)}")
        try:
            _filled(self, recipe())
        except UserError as error:
            raise _of_protocol(name, error) from None

    fields: list[Any] = [
        ("preset", str, setting("", f"published settings: {', '.join(preset_names(folder))}; empty: the source's own"))
    ]
    fields += [(key, *value) for key, value in further.items()]
    fields += [
        (field.name, field.type | None, setting(None, f"{field.metadata['help']}; null: the preset's"))  # type: ignore[operator]
        for field in dataclasses.fields(recipe)
    ]
    title = "".join(part.capitalize() for part in name.split("_")) + "Config"
    made = dataclasses.make_dataclass(title, fields, frozen=True, namespace={"__post_init__": check})
    made.__doc__ = f"Settings of the protocol {name}."
    return made


def choose(settings: Any, recipe: type[RecipeType], name: str, folder: str, preset: str) -> Chosen:
    """The recipe of a preset with the settings that a user gave.

    Raises:
        UserError: they do not fit the preset.
    """
    published = read_settings(recipe, with_bases(_folder(folder) / f"{preset}.yaml", recipe), name=f"preset {preset}")
    try:
        filled = _filled(settings, published)
    except UserError as error:
        raise _of_protocol(name, error) from None
    if filled.batch_size % world_size():
        raise UserError(
            f"{name}.batch_size: found {filled.batch_size}, expected a multiple of the {world_size()} ranks"
        )
    if filled.milestones and filled.milestones[-1] >= filled.epochs:
        log.warning(
            "%s.milestones: found %s in %d epochs, so the learning rate does not fall as in preset %s; set them too",
            *(name, list(filled.milestones), filled.epochs, preset),
        )
    different = {
        f"{name}.{field.name}": {"found": getattr(filled, field.name), "preset": getattr(published, field.name)}
        for field in dataclasses.fields(recipe)
        if getattr(filled, field.name) != getattr(published, field.name)
    }
    return Chosen(filled, preset, different)


def _filled(settings: Any, recipe: RecipeType) -> RecipeType:
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})


def _of_protocol(name: str, error: UserError) -> UserError:
    return UserError(f"{name}.{str(error).removeprefix('schedule.')}")


def _folder(name: str) -> Path:
    return FOLDER / "evaluation" / name


def _require(key: str, found: object, valid: bool, expected: str) -> None:
    if not valid:
        raise UserError(f"{key}: found {found}, expected {expected}")
