"""Encoders for the tests of the methods: a script that returns given embeddings, small real ones, and their steps.

Legend: B images, C embedding size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from caco_fast.engine.step import TrainStep
from caco_fast.methods import Method
from caco_fast.models import Encoder, EncoderPair, segment_batch_norm
from caco_fast.models.batch_norm import add_norm_sets


class ScriptedEncoders:
    """Takes views for embeddings: queries are the views, keys the views turned; `calls` says what was asked for."""

    def __init__(self, dim: int) -> None:
        self.turn, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
        self.calls: list[str] = []

    def queries(self, views: Sequence[Tensor]) -> list[Tensor]:
        self.calls.append(f"queries of {len(views)}")
        return list(views)

    def key_of(self, view: Tensor) -> Tensor:
        return (view.detach().double() @ self.turn).to(view.dtype)

    def keys(self, views: Sequence[Tensor]) -> list[Tensor]:
        self.calls.append(f"keys of {len(views)}")
        return [self.key_of(view) for view in views]

    def copy_query_to_key(self) -> None:
        self.calls.append("copy")


def small_pair(dim: int, joint_views: bool = False, key_encoder: bool = True, norm_sets: int = 1) -> EncoderPair:
    """A linear backbone and a projector with BatchNorm: [B, 3, 2, 2] to [B, C]."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU())
    projector = nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, dim))
    query = Encoder(segment_batch_norm(backbone), segment_batch_norm(projector), joint_views=joint_views)
    add_norm_sets(query, norm_sets)
    return EncoderPair(query, key_encoder)


def sgd_step(method: Method, pair: EncoderPair) -> TrainStep:
    """Steps of plain SGD; `step.enter(phase)` comes first, and the lr is that of the rates."""
    optimizer = torch.optim.SGD([*pair.query.parameters(), *method.parameters()], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainStep(method, pair, optimizer, scaler, torch.device("cpu"))
