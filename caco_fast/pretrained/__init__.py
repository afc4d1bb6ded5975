"""Pre-trained backbones from elsewhere and from here: what `caco-fast evaluate`, `embed` and `export` begin with."""

from caco_fast.pretrained.source import Pretrained, open_source

__all__ = ["Pretrained", "open_source"]
