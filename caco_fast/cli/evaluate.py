"""`caco-fast evaluate`: the evaluation that papers publish, of any pre-trained backbone.

Under torchrun the process is one rank of an evaluation. Exit status: that of `caco-fast train`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from caco_fast.cli.arguments import add_optional_source, add_trust, parser_of, require_source, split_source
from caco_fast.cli.endings import status_of
from caco_fast.errors import UserError
from caco_fast.storage import lasting_output

# Before torch is imported; see cli/train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EPILOG = """examples:
  %(prog)s runs/caco200 knn linear
  %(prog)s CaCo_200.pth.tar transfer transfer.sets=[food101,pets] data.path=/data
  %(prog)s runs/caco200 linear linear.preset=moco linear.lrs=[10,30,60]
  %(prog)s random:resnet18 knn data.source=cifar10 data.path=data/cifar10
"""


@lasting_output()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser(prog).parse_intermixed_args(arguments)
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    source, settings = split_source(options.source, [given for given in options.given if "=" in given])
    protocols = [given for given in options.given if "=" not in given]

    # After the arguments, so that --help and a mistyped option answer at once.
    from caco_fast.evaluation import evaluate, load_settings, markdown, read_results
    from caco_fast.protocols import PROTOCOLS, registered
    from caco_fast.settings_tree import describe

    try:
        if options.list:
            width = max(map(len, PROTOCOLS))
            print(*(f"{name:<{width}}  {entry.help}" for name, entry in PROTOCOLS.items()), sep="\n")
            return 0
        if options.table:
            print(markdown(read_results(options.table)))
            return 0
        if options.print_config:
            if rank == "0":
                print(describe(load_settings(settings)))
            return 0
        for name in protocols:
            registered(name)
        load_settings(settings)
        require_source(source)
        if not protocols:
            raise UserError(f"PROTOCOL: found none, expected one or more of {', '.join(PROTOCOLS)}")
        if twice := sorted({name for name in protocols if protocols.count(name) > 1}):
            raise UserError(f"PROTOCOL: found {twice[0]} twice, expected each protocol once")
    except UserError as error:
        if local_rank == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return status_of(
        lambda: evaluate(source, protocols, settings, options.trust),
        rank,
        "the same command continues",
        "what was written",
    )


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = parser_of(prog, "Evaluate a pre-trained backbone by the protocols that papers publish.", EPILOG)
    add_optional_source(parser)
    parser.add_argument("given", nargs="*", metavar="PROTOCOL|key=value", help="protocols, and settings of theirs")
    add_trust(parser)
    parser.add_argument("--list", action="store_true", help="show the protocols, and stop")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the results of a folder as Markdown, and stop")
    return parser
