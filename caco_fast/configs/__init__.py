"""The shipped configurations, and how `--config` and `base:` find one by its name or its path."""

import difflib
import itertools
import os
import re
from pathlib import Path

from caco_fast.errors import UserError

FOLDER = Path(__file__).resolve().parent


def shipped() -> dict[str, Path]:
    """Every shipped configuration by its name, such as "quickstart"."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def listing() -> str:
    """A line for each shipped configuration: its name, and the first sentence of its first comment."""
    files = shipped()
    width = max(map(len, files))
    return "\n".join(f"{name:<{width}}  {first_sentence(path)}" for name, path in files.items())


def find_config(given: str | Path) -> Path:
    """The file of a configuration that is given by its path or by its shipped name, with or without `.yaml`.

    A file that exists has priority over a shipped one.

    Raises:
        UserError: there is neither; the line gives the nearest shipped name.
    """
    path = Path(os.path.expanduser(given))
    return _find(path, path, f"--config {given}")


def find_base(base: str, file: Path) -> Path:
    """The file of `base: NAME` in a configuration file: a path from the file's folder, or a shipped name.

    Raises:
        UserError: there is neither; the line gives the nearest shipped name.
    """
    given = Path(os.path.expanduser(base))
    return _find(given, file.parent / given, f"--config {file}: base: {base}")


def _find(given: Path, path: Path, key: str) -> Path:
    # Only a bare name is looked up, because a path says where it expects the file.
    name = str(given).removesuffix(".yaml")
    files = shipped()
    if not path.is_file() and name in files:
        return files[name]
    if path.exists():
        return path
    near = difflib.get_close_matches(given.name.removesuffix(".yaml"), files, n=1, cutoff=0.0)[0]
    raise UserError(
        f"{key}: found no such file, expected a file or the name of a shipped configuration; the nearest name is {near}"
    )


def first_sentence(path: Path) -> str:
    """What a configuration says of itself in its first comment."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=\.) ", comment, maxsplit=1)[0]
