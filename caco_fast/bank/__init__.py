"""Banks of embeddings: learned by gradient (CaCo, AdCo), or a queue of keys (MoCo, NNCLR)."""

from caco_fast.bank.key_queue import KeyQueue
from caco_fast.bank.learnable import NORMS, LearnableBank
from caco_fast.bank.sharded import ShardedBank

__all__ = ["NORMS", "KeyQueue", "LearnableBank", "ShardedBank"]
