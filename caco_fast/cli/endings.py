"""The end of a command, whatever it is, as one line and an exit status."""

import sys
import traceback
from collections.abc import Callable

from caco_fast.errors import UserError


def status_of(action: Callable[[], object], rank: str, continues: str, kept: str) -> int:
    """Run a command and return its exit status; every end but a bug is one line.

    rank: of this process, as torchrun gives it. continues: what the user does next, "continue with --resume auto".
    kept: what is safe, "the last checkpoint".

    0 done, 2 the user can correct it, 75 another rank is gone, 128 + n stopped by signal n, 1 a bug.
    """
    # Here, so that a command can show its help without torch.
    from caco_fast.engine.ranks import Interrupted, RankLost, ReportedElsewhere

    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank == "0":
            print(f"interrupted; {kept} is kept: {continues}", file=sys.stderr)
        return 130
    except RankLost as lost:
        print(f"error: {lost}; {kept} is intact: {continues}", file=sys.stderr)
        return lost.exit_code
    except ReportedElsewhere as silent:
        return silent.exit_code
    except Interrupted as stopped:
        print(f"{stopped}; {continues}", file=sys.stderr)
        return stopped.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0
