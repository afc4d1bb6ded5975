"""Key images in another order than their queries, over all ranks: the shuffling BatchNorm of MoCo.

Where BatchNorm takes its statistics over a few images, a query and its key would share them, and the encoder could tell
the key by them. So the images of each view are dealt to the ranks and groups anew before the key encoder, and its keys
are put back in order. Source: MoCo (arXiv 1911.05722), section 3.3.

Legend: N ranks, B images on this rank, n = N B images in all.
"""

import torch
from torch import Tensor, nn

from caco_fast.distributed import all_gather_rows, rank, world_size

# The constants of SplitMix64 (Steele, Lea, Flood 2014), as signed numbers.
_ADDED, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class KeyShuffle(nn.Module):
    """An order of all images for each view, a function of the seed and the count of views before it.

    It is made on the device, so that the host never waits and a CUDA graph can hold it. Every rank makes the same one.
    state_dict: `count`, [] int64, so that a resumed run continues with the next order.
    """

    count: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def next_order(self, images: int) -> tuple[Tensor, Tensor]:  # [n] each
        """The order of the next view, given B, and the order that puts its keys back."""
        state = _mix(self.count + (self.seed % 2**31 << 32))
        state = _mix(state ^ torch.arange(images * world_size(), device=state.device))
        self.count.add_(1)
        order = state.argsort(stable=True)
        return order, order.argsort()

    @staticmethod
    def deal(rows: Tensor, order: Tensor) -> Tensor:  # [B, channels, ...], [n] -> [B, channels, ...]
        """The share of this rank in the rows of all ranks, once they are in this order; images come in channels_last.

        Every rank gets the rows of all: a captured step can't send what only this order needs, as sizes would change.
        """
        count = rows.shape[0]
        own = order[rank() * count : (rank() + 1) * count]
        return all_gather_rows(rows.movedim(1, -1)).index_select(0, own).movedim(-1, 1)


def _mix(state: Tensor) -> Tensor:
    """Numbers that look random, all different if those given are."""
    state = state + _ADDED
    state = (state ^ (state >> 30 & 2**34 - 1)) * _FIRST
    state = (state ^ (state >> 27 & 2**37 - 1)) * _SECOND
    return state ^ (state >> 31 & 2**33 - 1)
