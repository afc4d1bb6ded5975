"""The encoder (backbone and projector) and the pair of query encoder and EMA key encoder.

Legend: B images on this rank, C embedding size.
"""

import copy
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from caco_fast.models.apex_norm import use_apex_norm
from caco_fast.models.backbone import BackboneConfig, build_backbone, feature_width
from caco_fast.models.batch_norm import require_statistics_of_all_ranks, segment_batch_norm, segmented, separable
from caco_fast.models.projector import ProjectorConfig, build_projector
from caco_fast.ops import ema_update_
from caco_fast.ops.rates import Rate


class Encoder(nn.Module):
    """Images to L2-normalised embeddings in f32.

    BatchNorm statistics are taken per view. With `joint_views`, views of one size go through the convolutions as one
    batch nonetheless, if every BatchNorm can tell them apart (`segment_batch_norm`); else each is a forward of its own.
    `autocast` is the dtype that backbone and projector compute in; None leaves them in f32.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        autocast: torch.dtype | None = None,
        joint_views: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.autocast = autocast
        self.joint_views = joint_views and separable(self)

    def forward(self, *views: torch.Tensor) -> list[torch.Tensor]:  # each [B, channels, h, w] -> [B, C]
        if not self.joint_views:
            return [self._embed(view) for view in views]
        embeddings: list[torch.Tensor] = []
        # Neighbours only, so that running statistics take the views in their order.
        for _, same in itertools.groupby(views, key=lambda view: view.shape):
            batch = list(same)
            with segmented(self, len(batch)):
                embeddings += self._embed(torch.cat(batch)).chunk(len(batch))
        return embeddings

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
        self.momentum: Rate = 0.99
        self.ema_backend = ema_backend
        # What the forwards go through; in a tuple, a DistributedDataParallel wrapper stays out of state_dict().
        self._forward_query: tuple[nn.Module] = (query,)

    def wrap_query(self, wrapped: nn.Module) -> None:
        """Sends the forwards of the query encoder through `wrapped`, e.g. DistributedDataParallel(pair.query)."""
        self._forward_query = (wrapped,)

    def distribute(self, device: torch.device) -> None:
        """Averages the query encoder's gradients over all ranks.

        Raises:
            UserError: a BatchNorm whose statistics would be those of one rank.
        """
        require_statistics_of_all_ranks(self)
        wrapped = DistributedDataParallel(
            self.query,
            device_ids=[device.index] if device.type == "cuda" else None,
            # Every rank keeps the same BatchNorm buffers by itself, the statistics being those of all ranks.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # Every step is one forward that uses every parameter, in the bank's initialisation too.
            static_graph=True,
        )
        # Otherwise it times every hundredth step, waiting for the device; no one reads that, and no graph can hold it.
        wrapped._set_ddp_runtime_logging_sample_rate(2**31 - 1)
        self.wrap_query(wrapped)

    def queries(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:  # each [B, C]
        return self._forward_query[0](*views)

    @torch.no_grad()
    def keys(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:  # each [B, C]
        return self.key(*views)

    @torch.no_grad()
    def advance_key(self, skip: torch.Tensor | None = None) -> None:  # []
        """g <- m g + (1 - m) f, after the optimiser's step; not where the flag `skip` is not 0.

        The EMA stands between the forwards of queries and keys (docs/method.md, EMA). The optimiser's step is the last
        to change f before those queries, and g = f at the start, so that done here it gives the same keys; and a step
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
    joint_views: bool = False,
    ema_backend: str = "auto",
) -> EncoderPair:
    features = build_backbone(backbone, channels)
    use_apex_norm(backbone.apex, features, autocast)
    features = segment_batch_norm(features)
    head = segment_batch_norm(build_projector(projector, feature_width(features)))
    return EncoderPair(Encoder(features, head, autocast, joint_views), ema_backend)
