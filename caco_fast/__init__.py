"""caco_fast: contrastive pre-training with learnable banks.

`LearnableBank` and `CaCoLoss` are what a training loop of one's own needs; `caco_fast.ops` are the operations beneath.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CaCoLoss", "KeyQueue", "LearnableBank", "ShardedBank"]

if TYPE_CHECKING:
    from caco_fast.bank import KeyQueue, LearnableBank, ShardedBank
    from caco_fast.methods import CaCoLoss


def __getattr__(name: str) -> Any:
    # On first use, so that `import caco_fast` is free.
    if name == "CaCoLoss":
        from caco_fast.methods import CaCoLoss

        return CaCoLoss
    if name in ("KeyQueue", "LearnableBank", "ShardedBank"):
        import caco_fast.bank

        return getattr(caco_fast.bank, name)
    raise AttributeError(f"module 'caco_fast' has no attribute '{name}'")
