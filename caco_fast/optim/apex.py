"""FusedSGD of NVIDIA Apex, for those who have built it."""

import logging
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from caco_fast.apex import build_or_off, missing
from caco_fast.errors import UserError

log = logging.getLogger(__name__)


def fused_sgd(
    asked: str, groups: Sequence[dict[str, Any]], lr: float, momentum: float, weight_decay: float
) -> Optimizer | None:
    """FusedSGD where `asked` is on, or auto and it can be had; else None. It does what torch's SGD does, to rounding.

    Raises:
        UserError: it is asked for, and this device or this machine hasn't got it.
    """
    if asked == "off":
        return None
    reason = "FusedSGD needs parameters on a GPU"
    if all(p.is_cuda for group in groups for p in group["params"]):
        reason = missing("optimizers/fused_sgd.py", "amp_C")
    if reason is not None:
        if asked == "on":
            raise UserError(f"optimizer.apex: {reason}; {build_or_off('optimizer.apex')}")
        return None
    from apex.optimizers import FusedSGD

    log.info("the optimiser is FusedSGD of NVIDIA Apex (optimizer.apex=%s)", asked)
    return FusedSGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
