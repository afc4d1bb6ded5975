"""The encoder (backbone and projector) and the pair of query encoder and EMA key encoder.

Legend: B images on this rank, C embedding size.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from caco_fast.models.backbone import BackboneConfig, build_backbone, feature_width
from caco_fast.models.projector import ProjectorConfig, build_projector
from caco_fast.ops import ema_update_


class Encoder(nn.Module):
    """Images to L2-normalised embeddings in f32.

    Every view is a forward of its own, because BatchNorm statistics are taken per view.
    `autocast` is the dtype that backbone and projector compute in; None leaves them in f32.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.autocast = autocast

    def forward(self, *views: torch.Tensor) -> list[torch.Tensor]:  # each [B, channels, h, w] -> [B, C]
        return [self._embed(view) for view in views]

    def precision(self, device: torch.device) -> AbstractContextManager:
        """The context that backbone and projector compute in."""
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _embed(self, view: torch.Tensor) -> torch.Tensor:
        with self.precision(view.device):
            embedding = self.projector(self.backbone(view))
        return F.normalize(embedding.float(), dim=1)


class EncoderPair(nn.Module):
    """The query encoder `f`, which is trained, and the key encoder `g`, an EMA of it.

    The EMA covers parameters only: the BatchNorm buffers of `g` come from its own forwards, and both run in training
    mode. `momentum` is set by the trainer before every EMA step, whose implementation is `ema_backend`.
    """

    def __init__(self, query: Encoder, ema_backend: str = "auto") -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.momentum = 0.99
        self.ema_backend = ema_backend
        # What the forwards go through; in a tuple, a DistributedDataParallel wrapper stays out of state_dict().
        self._forward_query: tuple[nn.Module] = (query,)

    def wrap_query(self, wrapped: nn.Module) -> None:
        """Sends the forwards of the query encoder through `wrapped`, e.g. DistributedDataParallel(pair.query)."""
        self._forward_query = (wrapped,)

    def queries(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:  # each [B, C]
        return self._forward_query[0](*views)

    @torch.no_grad()
    def keys(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:  # each [B, C]
        return self.key(*views)

    @torch.no_grad()
    def advance_key(self, skip: torch.Tensor | None = None) -> None:  # []
        """g <- m g + (1 - m) f, after the optimiser's step; not where the flag `skip` is not 0.

        The EMA stands between the forwards of queries and keys (methods.md). The optimiser's step is the last to
        change f before those queries, and g = f at the start, so that done here it gives the same keys; and a step
        that is skipped leaves f and g as they were, with nothing to take back.
        """
        key, query = list(self.key.parameters()), list(self.query.parameters())
        ema_update_(key, query, 1.0 - self.momentum, skip=skip, backend=self.ema_backend)

    @torch.no_grad()
    def copy_query_to_key(self) -> None:
        """g <- f, at the end of the bank's initialisation."""
        torch._foreach_copy_(list(self.key.parameters()), list(self.query.parameters()))


def build_encoder_pair(
    backbone: BackboneConfig,
    projector: ProjectorConfig,
    channels: int,
    autocast: torch.dtype | None = None,
    ema_backend: str = "auto",
) -> EncoderPair:
    features = build_backbone(backbone, channels)
    head = build_projector(projector, feature_width(features))
    return EncoderPair(Encoder(features, head, autocast), ema_backend)
