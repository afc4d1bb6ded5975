"""Banks of embeddings: learned by gradient (CaCo, AdCo), or a queue of keys (MoCo, NNCLR)."""

from caco_fast.bank.key_queue import KeyQueue
from caco_fast.bank.learnable import LearnableBank

__all__ = ["KeyQueue", "LearnableBank"]
