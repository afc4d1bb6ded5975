"""caco_fast: contrastive pre-training with learnable banks.

`pretrain` is a whole training run. `LearnableBank` and `CaCoLoss` are the parts for a training loop of your own, and
`caco_fast.ops` has the operations under them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CaCoLoss", "KeyQueue", "LearnableBank", "ShardedBank", "pretrain"]

if TYPE_CHECKING:
    from caco_fast.api import pretrain
    from caco_fast.bank import KeyQueue, LearnableBank, ShardedBank
    from caco_fast.methods import CaCoLoss


_HOMES = {
    "CaCoLoss": "caco_fast.methods",
    "KeyQueue": "caco_fast.bank",
    "LearnableBank": "caco_fast.bank",
    "ShardedBank": "caco_fast.bank",
    "pretrain": "caco_fast.api",
}


def __getattr__(name: str) -> Any:
    # On first use, so that `import caco_fast` loads nothing else.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'caco_fast' has no attribute '{name}'")
