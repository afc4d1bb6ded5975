"""`caco-fast report`: a run folder as one HTML page; several run folders compared on one page.

Exit status: 0 done, 2 the user can correct it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from caco_fast.cli.arguments import add_print_config, parser_of
from caco_fast.cli.endings import status_of
from caco_fast.errors import UserError
from caco_fast.storage import lasting_output

# Before torch is imported; see cli/train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EPILOG = """examples:
  %(prog)s runs/quickstart
  %(prog)s runs/caco200 runs/mocov2 out=compared.html

The page needs no network and no other file. Of one run it is RUN/report/index.html, of several
report/compare.html in the folder of the first. An unfinished run has a page too.
"""


@lasting_output()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser(prog).parse_intermixed_args(arguments)
    # A folder may have an equals sign in its name.
    folders = [Path(given).expanduser() for given in options.given if "=" not in given or Path(given).is_dir()]
    settings = [given for given in options.given if "=" in given and not Path(given).is_dir()]

    # After the arguments, so that --help and a mistyped option answer at once.
    from caco_fast.report.write import ReportConfig, report
    from caco_fast.settings_tree import describe, read_settings

    try:
        config = read_settings(ReportConfig, overrides=settings)
        if options.print_config:
            print(describe(config))
            return 0
        if not folders:
            raise UserError("RUN: found none, expected one run folder or more, such as runs/quickstart")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status_of(lambda: print(report(folders, config)), "0", "the same command starts again", "an older page")


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = parser_of(prog, "Make one HTML page of a run, or of several runs compared.", EPILOG)
    parser.add_argument("given", nargs="*", metavar="RUN|key=value", help="run folders, and settings of the page")
    add_print_config(parser)
    return parser
