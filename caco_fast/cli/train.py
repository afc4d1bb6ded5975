"""`caco-fast train`: pre-train an encoder.

Under torchrun the process is one rank of a run; otherwise it is a run on one device. Exit status: 0 done, 2 the user
can correct it, 75 another rank is gone, 128 + n stopped by signal n after a checkpoint (docs/dependability.md).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caco_fast.cli.arguments import add_print_config
from caco_fast.cli.endings import status_of
from caco_fast.configs import find_config, listing
from caco_fast.errors import UserError
from caco_fast.storage import lasting_output

if TYPE_CHECKING:
    from caco_fast.config import Config

# Before torch is imported. Spinning OpenMP threads take the cores from the loader and from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


NO_CONFIG = "NAME or FILE, such as --config quickstart; --list-configs shows the shipped ones"


@lasting_output()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser(prog).parse_intermixed_args(arguments)
    if options.list_configs:
        print(listing())
        return 0
    if not options.config and not options.settings and not options.print_config:
        print(f"error: --config: found none, and no setting either, expected {NO_CONFIG}", file=sys.stderr)
        return 2
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))

    # After the arguments, so that --help and a mistyped option answer at once.
    from caco_fast.config import describe
    from caco_fast.scale import load_scaled

    try:
        file = find_config(options.config) if options.config else None
        config, chosen = load_scaled(file, options.settings)
    except UserError as error:
        # Every rank reads the same settings; one rank of each machine reports what is wrong with them.
        if local_rank == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    if options.print_config:
        if rank == "0":
            print(*([f"# {chosen}"] if chosen else []), describe(config), sep="\n")
        return 0
    if chosen and rank == "0":
        print(chosen)
    name = file.stem if file else config.method
    # The shell leaves the `~` of run.folder=~/runs as it is.
    folder = Path(os.path.expanduser(config.run.folder or f"runs/{name}"))
    return _train(config, folder, options, rank)


def _train(config: "Config", folder: Path, options: argparse.Namespace, rank: str) -> int:
    from caco_fast.training import dry_run, train

    def run() -> None:
        if options.dry_run:
            dry_run(config, folder)
        else:
            train(config, folder, os.path.expanduser(options.resume), options.released, options.trust)

    return status_of(run, rank, "continue with --resume auto", "the last checkpoint")


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pre-train an encoder with CaCo or a related method.",
        epilog="example: %(prog)s --config quickstart optimizer.lr=0.002 run.folder=runs/a",
    )
    parser.add_argument("--config", metavar="NAME|FILE", help="shipped configuration, or YAML file with settings")
    parser.add_argument("--list-configs", action="store_true", help="show the shipped configurations, and stop")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|FILE",
        help="auto: continue from the newest checkpoint of the run folder, or start if there is none; never (default): "
        "start, and refuse a folder that holds a run; FILE: continue from this checkpoint",
    )
    parser.add_argument(
        "--import",
        dest="released",
        default="",
        metavar="FILE[@epoch=N]",
        help="continue from a released checkpoint of CaCo or AdCo: both encoders, projectors, bank and velocity; "
        "@epoch=0 begins the schedule anew",
    )
    parser.add_argument(
        "--trust", action="store_true", help="load pickled classes of the imported FILE too, which runs code of it"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, do the first steps of each phase, show time and memory, and stop; writes no run folder",
    )
    add_print_config(parser)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the configuration")
    return parser
