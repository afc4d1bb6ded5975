"""`caco-fast export`: a backbone in the format of another library, read back and compared before it gets its name."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from caco_fast.cli.arguments import SOURCE, add_trust, parser_of
from caco_fast.errors import UserError

# Before torch is imported; see cli/train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EPILOG = """formats: {formats}
examples:
  %(prog)s runs/caco200 hub caco200
  %(prog)s runs/caco200@best torchvision caco200.pth
  %(prog)s CaCo_200.pth.tar detectron2 detection
  %(prog)s weights.pth onnx model.onnx backbone.name=resnet18 backbone.stem=small
"""
NAMES = ("torchvision", "timm", "hub", "safetensors", "detectron2", "mmdet", "lightly", "onnx", "bank")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser(prog).parse_intermixed_args(arguments)
    try:
        if options.format not in NAMES:
            raise UserError(f"FORMAT: found '{options.format}', expected one of {', '.join(NAMES)}")

        # After the arguments, so that --help and a mistyped option answer at once.
        from caco_fast.engine.progress import log_to_console
        from caco_fast.export import export
        from caco_fast.export.settings import architecture_of
        from caco_fast.pretrained import open_source

        log_to_console()
        pretrained = open_source(options.source, architecture_of(options.settings), trust=options.trust)
        done = export(pretrained, options.format, Path(options.out), force=options.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.format}: written to {done.path}; read back, largest difference {done.difference:.1e}")
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    what = "Write a pre-trained backbone for another library, read it back, and compare its features."
    parser = parser_of(prog, what, EPILOG.format(formats=", ".join(NAMES)))
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("format", metavar="FORMAT", help="one of the formats below")
    parser.add_argument("out", metavar="OUT", help="the file to write; hub and detectron2: a folder")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_trust(parser)
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="backbone.name, stem, options of a file that doesn't say them"
    )
    return parser
