"""Blocks that are made with care: a line on what is missing in place of an error."""

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.report.parts import Block, Missing

log = logging.getLogger("caco_fast.report")


def share_of(part: Tensor | int, whole: Tensor | int) -> str:
    """A part in per cent of the whole, for a table."""
    return f"{100.0 * float(part) / max(float(whole), 1.0):.1f} %"


def guarded(make: Callable[[], Sequence[Block]], what: str) -> Sequence[Block]:
    """The blocks that `make` gives, or why `what` is missing: a run never fails for a picture of its page."""
    try:
        return make()
    except UserError as error:
        return [Missing(f"{what}: {error}")]
    except Exception as error:
        # One line: some messages of libraries have several.
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        log.warning("the page lacks %s: %s", what, reason)
        return [Missing(f"{what}: an unexpected error, {reason}")]
