"""YAML read by the type of the setting that it is for.

The text of a number, a switch or a date means what the setting takes, and not what it looks like:

    text                 as it is written: 1.10, off and 20240501_1230 stay text
    true or false        true, yes, on; false, no, off
    a number             decimal: 1e-1 is a number, 010 is ten, and 1:30 is none
    of any type          a number, true, false or null, or else text
"""

import dataclasses
import re
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from caco_fast.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", MERGE)
NULLS = ("null", "Null", "NULL", "")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
# What is a number where text is allowed too.
NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|\.(inf|nan))", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """A loader that leaves every scalar as its text; `<<` alone keeps its meaning."""

    yaml_implicit_resolvers = {"<": [(MERGE, re.compile("^<<$"))]}


def read(text: str, kind: Any, key: str = "") -> Any:
    """The value of a whole YAML text for the setting `key` of type `kind`, None for an empty text.

    A value that does not fit its type is returned as text, for the caller to name it.

    Raises:
        UserError: the text is no YAML, a key is given twice, or `kind` does not say what yes, no, on or off mean.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(node, kind, key)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError("not valid YAML: a part of it contains itself") from None
    finally:
        loader.dispose()


def read_argument(text: str, kind: Any, key: str = "") -> Any:
    """The value of `key=text` on a command line, for a setting of type `kind`.

    Text is taken as it is, with blanks and `#`. Quotes around the whole of it are YAML's, so that '"null"' is text.
    """
    quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
    # An empty value empties a text.
    if not text or without_none(kind) is str and not quoted and text not in NULLS:
        return text
    return read(text, kind, key)


def without_none(kind: Any) -> Any:
    """T for `T | None`; every other type as it is."""
    if get_origin(kind) in (Union, UnionType):
        return next(t for t in get_args(kind) if t is not type(None))
    return kind


def inner_type(kind: Any, part: str) -> Any:
    """The type of the setting or element `part` of a section, list or mapping of type `kind`; None: there is none."""
    kind = without_none(kind)
    if dataclasses.is_dataclass(kind):
        return get_type_hints(kind).get(part)
    if get_origin(kind) in (list, tuple):
        return get_args(kind)[0] if part.isdigit() else None
    # What is inside of a value of any type is of any type too.
    return get_args(kind)[1] if get_origin(kind) is dict else Any if kind is Any else None


def _value(node: yaml.Node, kind: Any, key: str) -> Any:
    if node.tag not in TAGS:
        raise UserError(f"{key or 'value'}: found the tag {node.tag}, expected a value without a tag")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, kind, key)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, inner_type(kind, str(i)), f"{key}[{i}]") for i, item in enumerate(node.value)]
    return node.value if node.style in ("'", '"', "|", ">") else _scalar(node.value, kind, key)


def _mapping(node: yaml.MappingNode, kind: Any, key: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if name.tag == MERGE:
            for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                merged = {**_mapping(item, kind, key), **merged}
            continue
        if not isinstance(name, yaml.ScalarNode):
            raise UserError(f"line {line}: found a list or a mapping as a key, expected a name")
        full = f"{key}.{name.value}" if key else name.value
        if name.value in lines:
            raise UserError(f"{full}: found in line {lines[name.value]} and in line {line}, expected once")
        lines[name.value] = line
        own[name.value] = _value(value, inner_type(kind, name.value), full)
    return merged | own


def _scalar(text: str, kind: Any, key: str) -> Any:
    """The value of text that has no quotes."""
    # Of a text `~` is the beginning of a path.
    if text in NULLS or text == "~" and kind is not str:
        return None
    kind = without_none(kind)
    if kind in (int, float):
        return _number(text)
    word = text.lower()
    if kind is str or kind is bool and word not in TRUE + FALSE:
        return text
    if kind is Any and word in ("yes", "no", "on", "off"):
        raise UserError(f"{key or 'value'}: found {text}, expected true or false, or '{text}' in quotes as text")
    if word in ("true", "false") or kind is bool:
        return word in TRUE
    return _number(text) if NUMBER.fullmatch(text) else text


def _number(text: str) -> int | float | str:
    """The number that the text is, or the text."""
    for convert in (int, lambda text: int(text, 0), float):
        try:
            return convert(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            continue
    return text
