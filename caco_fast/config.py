"""The whole configuration: every component's own settings, from YAML and `key=value` arguments."""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from caco_fast.data import DataConfig, ViewConfig
from caco_fast.engine.metrics import WandbConfig
from caco_fast.engine.settings import CheckpointConfig, RunConfig, TrainerConfig
from caco_fast.errors import UserError
from caco_fast.evaluate.evaluator import EvaluationConfig
from caco_fast.methods import CaCoConfig, MoCoConfig
from caco_fast.models import BackboneConfig, ProjectorConfig
from caco_fast.optim import OptimizerConfig, ScheduleConfig
from caco_fast.settings import section, setting


@dataclass(frozen=True)
class Config:
    """What `tools/train.py` takes. Each section belongs to the component that it configures."""

    method: str = setting("caco", "caco or moco; the section of that name configures it")
    data: DataConfig = section(DataConfig, "images and their loader")
    views: list[ViewConfig] = setting([ViewConfig(count=2)], "how views are drawn; caco: two large ones first")
    backbone: BackboneConfig = section(BackboneConfig, "the encoder that is kept")
    projector: ProjectorConfig = section(ProjectorConfig, "the head that is trained with it")
    caco: CaCoConfig = section(CaCoConfig, "the learnable bank")
    moco: MoCoConfig = section(MoCoConfig, "the queue of keys")
    optimizer: OptimizerConfig = section(OptimizerConfig, "the encoder's optimiser")
    schedule: ScheduleConfig = section(ScheduleConfig, "learning rates and EMA momentum over the run")
    trainer: TrainerConfig = section(TrainerConfig, "length, batch, precision, device")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "what is kept to resume from")
    evaluation: EvaluationConfig = section(EvaluationConfig, "kNN during the run, linear probe at its end")
    run: RunConfig = section(RunConfig, "the run folder and what is written there")
    wandb: WandbConfig = section(WandbConfig, "Weights & Biases")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the YAML file, then `key=value` overrides such as `optimizer.lr=0.1` or `views.0.size=160`.

    A file may begin with `base: other.yaml`, found beside it, whose settings it then changes.

    Raises:
        UserError: a missing or malformed file, an unknown key (the nearest valid one is named), a mistyped value.
    """
    tree = OmegaConf.structured(Config)
    for source in _with_bases(path) if path is not None else ():
        tree = _merge_file(tree, *source)
    for override in overrides:
        _override(tree, override)
    return _to_config(tree, str(path) if path is not None else "settings")


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> Config:
    """The inverse of `to_yaml`.

    Raises:
        UserError: the text is not this version's configuration.
    """
    try:
        schema = OmegaConf.structured(Config)
        _make_writable(schema)
        tree = OmegaConf.merge(schema, OmegaConf.create(text))
    except OmegaConfBaseException as error:
        raise UserError(f"stored configuration: {_explain(error)}") from None
    return _to_config(tree, "stored configuration")


def describe(config: Config) -> str:
    """The resolved settings as YAML, each field with its line of help behind it."""
    rows = list(_rows(config, indent=""))
    width = min(48, max(len(text) for text, _ in rows))
    return "\n".join(f"{text:<{width}}  # {help}" if help else text for text, help in rows)


def settings_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf setting by its dotted key, e.g. {"optimizer.lr": 0.3, "views.0.size": 224}."""
    if dataclasses.is_dataclass(config):
        children = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    elif isinstance(config, list) and config and dataclasses.is_dataclass(config[0]):
        children = {str(i): item for i, item in enumerate(config)}
    else:
        return {prefix: config}
    leaves: dict[str, Any] = {}
    for name, value in children.items():
        leaves.update(settings_of(value, f"{prefix}.{name}" if prefix else name))
    return leaves


def _rows(config: Any, indent: str) -> Iterator[tuple[str, str]]:
    for f in dataclasses.fields(config):
        value, help = getattr(config, f.name), f.metadata["help"]
        if dataclasses.is_dataclass(value):
            yield f"{indent}{f.name}:", help
            yield from _rows(value, indent + "  ")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            yield f"{indent}{f.name}:", help
            for item in value:
                for i, (text, item_help) in enumerate(_rows(item, "")):
                    yield f"{indent}{'- ' if i == 0 else '  '}{text}", item_help
        else:
            yield f"{indent}{f.name}: {json.dumps(value)}", help


def _with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file and those it is based on, the first base first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    following: Path | None = path
    while following is not None:
        if any(following == seen for seen, _ in chain):
            raise UserError(f"--config {path}: {following} is its own base")
        given = _read_yaml(following)
        base = given.pop("base", None)
        chain.append((following, given))
        following = following.parent / str(base) if base is not None else None
    return chain[::-1]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise UserError(f"--config {path}: want a mapping of settings, found a {type(given).__name__}")
    return given


def _merge_file(tree: DictConfig, path: Path, given: dict[str, Any]) -> DictConfig:
    _make_writable(tree)
    try:
        return OmegaConf.merge(tree, OmegaConf.create(given))
    except OmegaConfBaseException as error:
        raise UserError(f"--config {path}: {_explain(error)}") from None
    except TypeError as error:
        raise UserError(f"--config {path}: a list stands where a mapping is wanted, or the reverse ({error})") from None


def _override(tree: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"argument '{override}': want key=value, e.g. optimizer.lr=0.1")
    _make_writable(tree)
    try:
        # OmegaConf reads `key=` as null; here it empties a string.
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"] if value else ""
        # An empty mapping empties what is there; every other one is merged into it.
        OmegaConf.update(tree, key, parsed, merge=parsed != {})
    except OmegaConfBaseException as error:
        raise UserError(f"argument '{override}': {_explain(error)}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"argument '{override}': {' '.join(str(error).split())}") from None


def _to_config(tree: DictConfig, name: str) -> Config:
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {_explain(error)}") from None


def _make_writable(node: Any) -> None:
    # Frozen dataclasses become read-only nodes, and every node carries the flag itself.
    OmegaConf.set_readonly(node, None)
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(key)
        if isinstance(child, (DictConfig, ListConfig)) and not child._is_none():
            _make_writable(child)


def _explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's first line, with the nearest valid setting of the whole configuration where a key is unknown."""
    message = str(error).splitlines()[0].rstrip(".")
    full_key = str(getattr(error, "full_key", "") or "")
    if isinstance(error, ValidationError) and "is not a subclass of" in message:
        where = full_key or message.partition("value: ")[2]
        return f"{where}: a group of settings is wanted there, or its list is not that long"
    if not isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return f"{full_key}: {message}" if full_key else message
    name = full_key.rsplit(".", 1)[-1]
    leaves = list(settings_of(Config()))
    valid = leaves if "." in full_key else [f.name for f in dataclasses.fields(Config)] + leaves
    near = difflib.get_close_matches(full_key, valid, n=1, cutoff=0.75)
    near = near or [key for key in valid if key.rsplit(".", 1)[-1] == name]
    near = near or [
        key
        for key in valid
        if key.rsplit(".", 1)[-1] in difflib.get_close_matches(name, [k.rsplit(".", 1)[-1] for k in valid], n=1)
    ]
    hint = f"did you mean '{near[0]}'?" if near else "--print-config lists every setting"
    return f"unknown setting '{full_key}'; {hint}"
