"""Typed settings: a dataclass field that carries its line of help."""

import copy
from dataclasses import field
from typing import Any

from caco_fast.errors import UserError


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and the line that `--print-config` shows with it.

    Lists and dicts are copied for every instance, so a mutable default is safe.
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def section(kind: type, help: str) -> Any:
    """A dataclass field that holds another component's settings at their defaults."""
    return field(default_factory=kind, metadata={"help": help})


def switch(name: str, value: str) -> str:
    """Read auto, on or off. Python gives the last two as true and false.

    Raises:
        UserError: any other value.
    """
    read = {"true": "on", "false": "off"}.get(value.lower(), value)
    if read not in ("auto", "on", "off"):
        raise UserError(f"{name}: found '{value}', expected auto, on or off")
    return read


def require_at_least(name: str, value: int, least: int) -> None:
    """Raise UserError if a setting is too small."""
    if value < least:
        raise UserError(f"{name}: found {value}, expected at least {least}")
