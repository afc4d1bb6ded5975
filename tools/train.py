#!/usr/bin/env python3
"""Pre-trains an encoder: python tools/train.py --config quickstart [key=value ...]

Under torchrun it is one rank of a run; by itself it is a run on one device. Exit status: 0 done, 2 the user can mend
it, 75 another rank is gone, 128 + n stopped by signal n after a checkpoint (docs/dependability.md).
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

# Spinning OpenMP threads starve the loader, and everything else, on a machine whose cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Pre-train an encoder with CaCo or a sibling method.",
        epilog="example: python tools/train.py --config quickstart optimizer.lr=0.002 run.folder=runs/a",
    )
    parser.add_argument("--config", type=Path, help="YAML file with settings; see configs/")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|PATH",
        help="auto: go on from the newest checkpoint of the run folder, or start there; never (default): start, and "
        "refuse a folder that holds a run; PATH: go on from this checkpoint",
    )
    parser.add_argument("--print-config", action="store_true", help="show every setting with its help, and stop")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file")
    arguments = parser.parse_args()

    # After the arguments, so that --help and a mistyped option answer at once.
    from caco_fast.config import describe, load_config
    from caco_fast.engine.ranks import Interrupted, RankLost, ReportedElsewhere
    from caco_fast.errors import UserError
    from caco_fast.training import train

    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    try:
        config = load_config(arguments.config, arguments.settings)
    except UserError as error:
        # Every rank reads the same settings; one of each machine says what is wrong with them.
        if local_rank == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.print_config:
        if rank == "0":
            print(describe(config))
        return 0
    name = arguments.config.stem if arguments.config else config.method
    try:
        train(config, Path(config.run.folder or f"runs/{name}"), arguments.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank == "0":
            print("interrupted; what the last checkpoint holds is kept: go on with --resume auto", file=sys.stderr)
        return 130
    except RankLost as lost:
        print(f"error: {lost}; the last checkpoint is intact: go on with --resume auto", file=sys.stderr)
        return lost.exit_code
    except ReportedElsewhere as silent:
        return silent.exit_code
    except Interrupted as stopped:
        print(f"{stopped}; go on with --resume auto", file=sys.stderr)
        return stopped.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def leave(status: int) -> None:
    """Ends the process; one of several ranks at once, because taking down its connections may wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
