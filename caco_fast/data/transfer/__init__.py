"""The sets of images that encoders are transferred to, from their release files: `open_set("food101", root)`."""

from caco_fast.data.transfer.sets import TRANSFER_SETS, TransferSet, open_set
from caco_fast.data.transfer.voc import VocSource

__all__ = ["TRANSFER_SETS", "TransferSet", "VocSource", "open_set"]
