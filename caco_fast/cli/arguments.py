"""Arguments that several commands take."""

import argparse

from caco_fast.errors import UserError

SOURCE = "run folder, checkpoint, file or folder of weights, torchvision:NAME, timm:NAME or random:NAME"


def parser_of(prog: str | None, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser whose epilog keeps its lines."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=description, epilog=epilog, formatter_class=form)


def add_optional_source(parser: argparse.ArgumentParser) -> None:
    """SOURCE, which --help-like options of a command do without, and --print-config."""
    parser.add_argument("source", nargs="?", default="", metavar="SOURCE", help=SOURCE)
    add_print_config(parser)


def add_print_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print-config", action="store_true", help="show every setting with its help, and stop")


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="store_true", help="load pickled classes of SOURCE too, which runs code of that file"
    )


def split_source(source: str, settings: list[str]) -> tuple[str, list[str]]:
    """SOURCE and the settings; without SOURCE a setting may be in its place, for --print-config."""
    return ("", [*settings, source]) if "=" in source else (source, settings)


def require_source(source: str) -> None:
    """Raise UserError if no source is given."""
    if not source:
        raise UserError("SOURCE: found none, expected a run folder, a file of weights, or random:NAME; see --help")
