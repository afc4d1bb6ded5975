"""Settings of a dataclass from YAML files and `key=value` arguments, and the lines that say what is wrong with them."""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigIndexError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from caco_fast.configs import find_base, find_config
from caco_fast.errors import UserError
from caco_fast.typed_yaml import inner_type, read, read_argument

Settings = TypeVar("Settings")


def read_settings(
    kind: type[Settings],
    files: Sequence[tuple[Path, dict[str, Any]]] = (),
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    name: str = "settings",
) -> Settings:
    """An object of a dataclass: its defaults, then `defaults`, then files, then `key=value` overrides.

    files: as `with_bases` returns them. name: of the whole, for a line about a value that is missing.

    Raises:
        UserError: an unknown key (the nearest valid one is named), or a mistyped value.
    """
    tree = OmegaConf.structured(kind)
    for key, value in defaults.items():
        _override(tree, f"{key}={value if isinstance(value, str) else json.dumps(value)}", kind)
    for file, given in files:
        tree = _merge_file(tree, file, given, kind)
    for override in overrides:
        _override(tree, override, kind)
    return _to_object(tree, kind, name)


def to_yaml(settings: Any) -> str:
    """The resolved settings as YAML that `from_yaml` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def from_yaml(text: str, kind: type[Settings], name: str) -> Settings:
    """The object of a dataclass that `to_yaml` wrote."""
    schema = OmegaConf.structured(kind)
    _make_writable(schema)
    return _to_object(OmegaConf.merge(schema, read(text, kind)), kind, name)


def describe(config: Any) -> str:
    """The resolved settings as YAML, each field followed by its line of help."""
    rows = list(_rows(config, indent=""))
    width = min(48, max(len(text) for text, _ in rows))
    return "\n".join(f"{text:<{width}}  # {help}" if help else text for text, help in rows)


def settings_of(config: Any) -> dict[str, Any]:
    """Every leaf setting by its dotted key, e.g. {"optimizer.lr": 0.3, "views.0.size": 224}."""
    return _leaves(
        config, dataclasses.is_dataclass, lambda part: {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    )


def flat_settings(tree: Any) -> dict[str, Any]:
    """`settings_of` for settings that were read from YAML, of whatever version."""
    return _leaves(tree, lambda part: isinstance(part, dict), lambda part: part)


def _leaves(
    tree: Any, is_section: Callable[[Any], bool], children: Callable[[Any], dict[Any, Any]], key: str = ""
) -> dict[str, Any]:
    """The leaves of sections and of lists of sections by their dotted key; a list of anything else is a leaf."""
    if is_section(tree):
        parts = children(tree)
    elif isinstance(tree, list) and tree and is_section(tree[0]):
        parts = dict(enumerate(tree))
    else:
        return {key: tree}
    leaves: dict[str, Any] = {}
    for name, value in parts.items():
        leaves |= _leaves(value, is_section, children, f"{key}.{name}" if key else str(name))
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


def with_bases(path: Path | str, kind: type) -> list[tuple[Path, dict[str, Any]]]:
    """The file and those it is based on, the first base first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    following: Path | None = find_config(path)
    while following is not None:
        if any(following == seen for seen, _ in chain):
            raise UserError(f"--config {path}: {following} is its own base")
        given = _read_file(following, kind)
        base = given.pop("base", None)
        chain.append((following, given))
        following = find_base(str(base), following) if base is not None else None
    return chain[::-1]


def _read_file(path: Path, kind: type) -> dict[str, Any]:
    try:
        given = read(path.read_text(), kind) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"--config {path}: found a {type(given).__name__}, expected a mapping of settings")
    return given


def _merge_file(tree: DictConfig, path: Path, given: dict[str, Any], kind: type) -> DictConfig:
    _make_writable(tree)
    try:
        for key in _emptied(given, kind):
            OmegaConf.update(tree, key, {}, merge=False)
        return OmegaConf.merge(tree, OmegaConf.create(given))
    except OmegaConfBaseException as error:
        raise UserError(f"--config {path}: {_explain(error, kind, given)}") from None
    except TypeError as error:
        raise UserError(f"--config {path}: found a list, expected a mapping, or the reverse ({error})") from None


def _emptied(given: Any, kind: Any, key: str = "") -> Iterator[str]:
    """The keys of mappings that are given as {}, which empties what a base has there."""
    if given == {} and get_origin(kind) is dict:
        yield key
    elif isinstance(given, dict):
        for name, value in given.items():
            yield from _emptied(value, inner_type(kind, name), f"{key}.{name}" if key else name)


def _override(tree: DictConfig, override: str, kind: type) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"argument '{override}': expected key=value, e.g. optimizer.lr=0.1")
    _make_writable(tree)
    try:
        parsed = read_argument(value, _kind(key, kind), key)
    except UserError as error:
        hint = "the value is not valid YAML; a bracket or quote may be open"
        raise UserError(f"argument '{override}': {hint if 'not valid YAML' in str(error) else error}") from None
    try:
        # An empty mapping empties what is there; every other one is merged into it.
        OmegaConf.update(tree, key, parsed, merge=parsed != {})
    except OmegaConfBaseException as error:
        given: Any = parsed
        for part in reversed(_parts(key)):
            given = {part: given}
        raise UserError(f"argument '{override}': {_explain(error, kind, given)}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"argument '{override}': {' '.join(str(error).split())}") from None


def _to_object(tree: DictConfig, kind: type[Settings], name: str) -> Settings:
    try:
        return OmegaConf.to_object(tree)
    except MissingMandatoryValue as error:
        raise UserError(f"{name}: {error.full_key}: ??? is no value") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {_explain(error, kind)}") from None


def _make_writable(node: Any) -> None:
    # Frozen dataclasses become read-only nodes, and every node carries the flag itself.
    OmegaConf.set_readonly(node, None)
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(key)
        if isinstance(child, (DictConfig, ListConfig)) and not child._is_none():
            _make_writable(child)


def _explain(error: OmegaConfBaseException, kind: type, given: Any = None) -> str:
    """One line: the key, what was found in `given`, and what is expected; for an unknown key the nearest one."""
    message = str(error).splitlines()[0].rstrip(".")
    key = str(getattr(error, "full_key", "") or "")
    if isinstance(error, (InterpolationResolutionError, GrammarParseError)):
        return f"{key or 'value'}: ${{...}} refers to another setting's value, and this one can't be read so"
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return _unknown(key, kind)
    if isinstance(error, ConfigIndexError) or "is not a subclass of" in message and key.endswith("]"):
        return f"{key}: a group of settings is expected there, or its list is not that long"
    if expected := _in_words(_kind(key, kind)) if key else "":
        return f"{key}: found {_found(given, key)}, expected {expected}"
    # Within a list of groups OmegaConf does not say where.
    found = re.fullmatch(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message)
    kinds = {"Integer": int, "Float": float, "Boolean": bool, "String": str}
    if found and found[2] in kinds:
        return f"{key}: found {found[1]!r}, expected {_in_words(kinds[found[2]])}"
    if "is not a subclass of" in message:
        return f"{key or message.partition('value: ')[2]}: a group of settings is expected there"
    return f"{key}: {message}" if key else message


def _found(given: Any, key: str) -> str:
    """The value at `key` in nested settings as given, or the nearest one above it."""
    for part in _parts(key):
        if isinstance(given, dict) and part in given:
            given = given[part]
        elif isinstance(given, list) and part.isdigit() and int(part) < len(given):
            given = given[int(part)]
    return json.dumps(given, default=str)


def _parts(key: str) -> list[str]:
    """views[0].size and views.0.size alike."""
    return re.findall(r"[^.\[\]]+", key)


def _kind(key: str, kind: Any) -> Any:
    """The type of a setting of a dataclass; None where `key` names none."""
    for part in _parts(key):
        kind = inner_type(kind, part)
    return kind


def _in_words(kind: Any) -> str:
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    inner = get_args(kind)
    if kind in simple:
        return simple[kind]
    if get_origin(kind) in (Union, UnionType):
        return " or ".join([_in_words(t) for t in inner if t is not type(None)] + ["null"])
    if get_origin(kind) is tuple:
        return f"a list of {len(inner)} numbers"
    if get_origin(kind) is list:
        of = inner[0]
        return "a list of groups of settings" if dataclasses.is_dataclass(of) else f"a list, each {_in_words(of)}"
    if get_origin(kind) is dict:
        return "a mapping, as {name: value}"
    return "a group of settings" if dataclasses.is_dataclass(kind) else ""


def _unknown(key: str, kind: type) -> str:
    name = key.rsplit(".", 1)[-1]
    leaves = list(settings_of(kind()))
    valid = leaves if "." in key else [f.name for f in dataclasses.fields(kind)] + leaves
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.75)
    near = near or [key for key in valid if key.rsplit(".", 1)[-1] == name]
    near = near or [
        key
        for key in valid
        if key.rsplit(".", 1)[-1] in difflib.get_close_matches(name, [k.rsplit(".", 1)[-1] for k in valid], n=1)
    ]
    hint = f"did you mean '{near[0]}'?" if near else "--print-config lists every setting"
    return f"unknown setting '{key}'; {hint}"
