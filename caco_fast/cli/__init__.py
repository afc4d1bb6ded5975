"""The command line `caco-fast COMMAND ...`, also `python -m caco_fast COMMAND ...`.

A command is a function `main(arguments, prog)` that parses its own arguments and returns the exit status. Its module is
imported only when the command runs, so that `--help` answers at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from caco_fast import __version__
from caco_fast.errors import UserError

# Name: module with `main`, line of help. A new command is one line here.
COMMANDS = {
    "train": ("caco_fast.cli.train", "pre-train an encoder"),
    "evaluate": ("caco_fast.cli.evaluate", "evaluate a pre-trained backbone as papers do"),
    "report": ("caco_fast.cli.report", "make a page of a run, or of several runs compared"),
    "export": ("caco_fast.cli.export", "write a backbone for timm, torchvision, detectron2, ONNX and others"),
    "embed": ("caco_fast.cli.embed", "write the features of a folder of images"),
    "index": ("caco_fast.data.sources.make_index", "check a folder of images and write an index to train from"),
    "selftest": ("caco_fast.selftest", "compare the CUDA kernels on this GPU with f64"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a UserError becomes one line and status 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    module, _ = COMMANDS[options.command]
    try:
        return importlib.import_module(module).main(options.arguments, prog=f"caco-fast {options.command}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def leave(status: int) -> NoReturn:
    """End the process. One of several ranks ends at once, because closing its connections may wait for the others."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        # The terminal is gone. Python would replace the status by its own.
        os._exit(status)
    if status and os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(status)
    sys.exit(status)


def program() -> NoReturn:
    """Run the whole program: what the installed `caco-fast` calls."""
    leave(main())


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="caco-fast",
        description="Contrastive pre-training with learnable banks.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {help}" for name, (_, help) in COMMANDS.items())
        + "\n\n`caco-fast COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"caco-fast {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    return parser
