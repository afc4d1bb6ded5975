"""FusedSGD of NVIDIA Apex, for those who have built it (github.com/NVIDIA/apex)."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from caco_fast.errors import UserError

log = logging.getLogger(__name__)

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


def missing() -> str | None:
    """Why FusedSGD can't be had here, or None."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "NVIDIA Apex is not installed"
    # By its files, not by import: the package index's apex fails to import.
    folders = found.submodule_search_locations or ()
    if not any(Path(folder, "optimizers", "fused_sgd.py").is_file() for folder in folders):
        return "the installed package 'apex' is the package index's, another project; uninstall it"
    if importlib.util.find_spec("amp_C") is None:
        return "NVIDIA Apex is installed without its CUDA extensions"
    return None


def fused_sgd(
    asked: str, params: Sequence[Tensor], lr: float, momentum: float, weight_decay: float
) -> Optimizer | None:
    """FusedSGD where `asked` is on, or auto and it can be had; else None. It does what torch's SGD does, to rounding.

    Raises:
        UserError: it is asked for, and this device or this machine hasn't got it.
    """
    if asked == "off":
        return None
    reason = missing() if all(p.is_cuda for p in params) else "FusedSGD needs parameters on a GPU"
    if reason is not None:
        if asked == "on":
            raise UserError(f"optimizer.apex: {reason}; build it by `{BUILD}`, or set optimizer.apex=off")
        return None
    from apex.optimizers import FusedSGD

    log.info("the optimiser is FusedSGD of NVIDIA Apex (optimizer.apex=%s)", asked)
    return FusedSGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
