"""Backbone, projector, and the pair of query and key encoder."""

from caco_fast.models.backbone import BackboneConfig, build_backbone
from caco_fast.models.batch_norm import group_batch_norm, segment_batch_norm
from caco_fast.models.encoder import Encoder, EncoderPair, build_encoder_pair
from caco_fast.models.input_size import require_sizes
from caco_fast.models.projector import ProjectorConfig, build_mlp, build_projector
from caco_fast.models.recompute import recompute_activations
from caco_fast.models.small_alexnet import SmallAlexNet

__all__ = [
    "BackboneConfig",
    "Encoder",
    "EncoderPair",
    "ProjectorConfig",
    "SmallAlexNet",
    "build_backbone",
    "build_encoder_pair",
    "build_mlp",
    "build_projector",
    "group_batch_norm",
    "recompute_activations",
    "require_sizes",
    "segment_batch_norm",
]
