"""`caco-fast embed`: features of any folder of images, with their file names.

Under torchrun the process is one rank. Exit status: that of `caco-fast train`.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from caco_fast.cli.arguments import add_optional_source, add_trust, parser_of, require_source, split_source
from caco_fast.cli.endings import status_of
from caco_fast.errors import UserError
from caco_fast.storage import lasting_output

# Before torch is imported; see cli/train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EPILOG = """examples:
  %(prog)s runs/quickstart data=photos out=photos.safetensors
  %(prog)s CaCo_200.pth.tar data=photos out=photos.npy normalise=true size=224 resize=256
"""


@lasting_output()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser(prog).parse_intermixed_args(arguments)
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    source, settings = split_source(options.source, options.settings)

    # After the arguments, so that --help and a mistyped option answer at once.
    from caco_fast.embed import EmbedConfig, embed
    from caco_fast.settings_tree import describe, read_settings

    try:
        config = read_settings(EmbedConfig, overrides=settings)
        if options.print_config:
            if rank == "0":
                print(describe(config))
            return 0
        require_source(source)
        config.require_places()
    except UserError as error:
        if local_rank == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return status_of(
        lambda: embed(source, config, options.trust), rank, "the same command continues", "what was extracted"
    )


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = parser_of(prog, "Write the features of all images below a folder, with their file names.", EPILOG)
    add_optional_source(parser)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings; data=DIR and out=FILE are needed")
    add_trust(parser)
    return parser
