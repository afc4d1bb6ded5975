"""The encoder (backbone and projector), and the pair of the query encoder and its EMA, the key encoder.

Legend: B images on this rank, C embedding size.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caco_fast.models.apex_norm import use_apex_norm
from caco_fast.models.backbone import BackboneConfig, build_backbone, feature_width
from caco_fast.models.batch_norm import (
    add_norm_sets,
    drop_norm_sets,
    group_batch_norm,
    segment_batch_norm,
    segmented,
    separable,
)
from caco_fast.models.key_shuffle import KeyShuffle
from caco_fast.models.projector import ProjectorConfig, build_projector
from caco_fast.models.weights import initialise
from caco_fast.ops import ema_update_
from caco_fast.ops.rates import Rate


class Encoder(nn.Module):
    """Images to L2-normalised embeddings in f32.

    BatchNorm statistics are taken per view. With `joint_views`, views of one size still go through the convolutions as
    one batch, if every BatchNorm can tell them apart (`segment_batch_norm`). Otherwise each view has its own forward.
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

    def forward(
        self,
        *views: Tensor,  # each [B, channels, h, w]
        norm_sets: Sequence[int] = (),
    ) -> list[Tensor]:  # each [B, C]
        """Embed views; `norm_sets` names the BatchNorm set of each, 0 for all by default."""
        sets = norm_sets or [0] * len(views)
        embeddings: list[Tensor] = []
        if not self.joint_views:
            for view, norm_set in zip(views, sets, strict=True):
                with segmented(self, 1, norm_set) if norm_set else nullcontext():
                    embeddings.append(self._embed(view))
            return embeddings
        # Neighbours only, so that running statistics take the views in their order.
        grouped = itertools.groupby(zip(views, sets, strict=True), key=lambda pair: (pair[0].shape, pair[1]))
        for (_, norm_set), same in grouped:
            batch = [view for view, _ in same]
            with segmented(self, len(batch), norm_set):
                embeddings += self._embed(torch.cat(batch)).chunk(len(batch))
        return embeddings

    def precision(self, device: torch.device) -> AbstractContextManager:
        """The context that backbone and projector compute in."""
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _embed(self, view: Tensor) -> Tensor:
        with self.precision(view.device):
            embedding = self.projector(self.backbone(view))
        return F.normalize(embedding.float(), dim=1)


class EncoderPair(nn.Module):
    """The query encoder `f`, which is trained, and, for methods that need one, the key encoder `g`, an EMA of it.

    The EMA covers parameters only: the BatchNorm buffers of `g` come from its own forwards, and both run in training
    mode. Parameters are paired by name: `f` may have more of them, such as a second set of BatchNorms.

    shuffle: deals the images of all ranks anew for the key encoder in training mode; None leaves them in their order.
    """

    key: Encoder | None

    def __init__(self, query: Encoder, key_encoder: bool = True, shuffle: KeyShuffle | None = None) -> None:
        super().__init__()
        self.query = query
        self.key = None
        self.shuffle = shuffle
        if key_encoder:
            self.key = copy.deepcopy(query).requires_grad_(False)
            drop_norm_sets(self.key)

    def queries(self, views: Sequence[Tensor], norm_sets: Sequence[int] = ()) -> list[Tensor]:  # each [B, C]
        """Embeddings by `f`, whose gradient trains it. A method may call it more than once in a step."""
        return self.query(*views, norm_sets=norm_sets)

    def embed(self, views: Sequence[Tensor], norm_sets: Sequence[int] = ()) -> list[Tensor]:  # each [B, C]
        """Embeddings by `f` as a constant function: gradients reach the views, and no parameter."""
        with _constant(self.query):
            return self.query(*views, norm_sets=norm_sets)

    @torch.no_grad()
    def keys(self, views: Sequence[Tensor]) -> list[Tensor]:  # each [B, C]
        """Embeddings by `g`, without gradient.

        Raises:
            RuntimeError: the pair was built without a key encoder.
        """
        if self.key is None:
            raise RuntimeError("the method asked for keys, but its `key_encoder` is False")
        if self.shuffle is None or not self.key.training:
            return self.key(*views)
        orders = [self.shuffle.next_order(view.shape[0]) for view in views]
        keys = self.key(*(self.shuffle.deal(view, order) for view, (order, _) in zip(views, orders, strict=True)))
        return [self.shuffle.deal(key, back) for key, (_, back) in zip(keys, orders, strict=True)]

    @torch.no_grad()
    def advance_key(self, momentum: Rate, skip: Tensor | None = None) -> None:  # [], []
        """g <- m g + (1 - m) f, after the optimiser's step, unless the flag `skip` is not 0.

        In the formulas (docs/method.md) the EMA comes between the forwards of queries and keys. The optimiser's step
        is the last to change f before those queries, and g = f at the start, so the same keys result here. A skipped
        step leaves f and g unchanged, with nothing to undo.
        """
        key, query = self._paired()
        if key:
            ema_update_(key, query, 1.0 - momentum, skip=skip)

    @torch.no_grad()
    def copy_query_to_key(self) -> None:
        """g <- f, at the end of the bank's initialisation."""
        key, query = self._paired()
        if key:
            torch._foreach_copy_(key, query)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A run may be resumed with or without the shuffle.
        name = f"{prefix}shuffle.count"
        if self.shuffle is None:
            state_dict.pop(name, None)
        else:
            state_dict.setdefault(name, self.shuffle.count)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _paired(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of g, and the parameters of f with the same names."""
        if self.key is None:
            return [], []
        query = dict(self.query.named_parameters())
        named = list(self.key.named_parameters())
        return [value for _, value in named], [query[name] for name, _ in named]


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """A context in which no parameter of `module` requires a gradient."""
    trained = [value for value in module.parameters() if value.requires_grad]
    for value in trained:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in trained:
            value.requires_grad_(True)


def build_encoder_pair(
    backbone: BackboneConfig,
    projector: ProjectorConfig,
    channels: int,
    autocast: torch.dtype | None = None,
    joint_views: bool = False,
    key_encoder: bool = True,
    norm_sets: int = 1,
    norm_images: int = 0,
    shuffle_seed: int | None = None,
) -> EncoderPair:
    """Both encoders from their settings.

    channels: of the images. key_encoder: whether the method needs keys. norm_sets: sets of BatchNorm weights and
    statistics in the query encoder. norm_images: of this rank that a BatchNorm takes its statistics over; 0: all of all
    ranks. shuffle_seed: of the orders in which the key encoder gets the images; None: in their own order.
    """
    features = build_backbone(backbone, channels)
    if backbone.init:
        initialise(features, backbone.init, backbone.name, channels, backbone.options)
    use_apex_norm(backbone.apex, features, autocast, norm_images)
    features = segment_batch_norm(features)
    head = segment_batch_norm(build_projector(projector, feature_width(features)))
    query = Encoder(features, head, autocast, joint_views)
    add_norm_sets(query, norm_sets)
    group_batch_norm(query, norm_images)
    return EncoderPair(query, key_encoder, None if shuffle_seed is None else KeyShuffle(shuffle_seed))
