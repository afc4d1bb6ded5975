"""The encoders and the bank of one of our runs, as one of its checkpoints holds them. Legend: K rows, C channels."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from caco_fast.config import Config, config_from_yaml
from caco_fast.engine.checkpoint import load_state
from caco_fast.models import BackboneConfig, Encoder, build_backbone, build_encoder_pair
from caco_fast.pretrained.banks import key_queues, learned_banks


class Saved(NamedTuple):
    """What a checkpoint holds of what was learned, on the CPU and in evaluation mode."""

    config: Config
    step: int  # of all phases
    channels: int  # of the images
    query: Encoder
    key: Encoder | None  # None: the method has no key encoder
    bank: Tensor | None  # [K, C] in f32: the rows of the learned bank or of the queue; None: there is neither
    learned: bool  # whether it is a bank, and not a queue


def read_encoders(path: Path, autocast: torch.dtype | None = None) -> Saved:
    """Both encoders, with their projectors, and the bank of a checkpoint of ours.

    autocast: the dtype that the encoders compute in; None: f32.

    Raises:
        UserError: the file is no intact checkpoint.
    """
    state = load_state(path)
    config, weights = config_from_yaml(state["config"]), state["encoders"]
    channels = next(value.shape[1] for name, value in _of(weights, "query.backbone.").items() if value.ndim == 4)
    with torch.random.fork_rng(devices=[]):
        pair = build_encoder_pair(
            architecture_of(config),
            config.projector,
            channels,
            autocast=autocast,
            key_encoder=any(name.startswith("key.") for name in weights),
        )
    for name, encoder in (("query.", pair.query), ("key.", pair.key)):
        if encoder is not None:
            encoder.load_state_dict(_of(weights, name))
    learned = learned_banks(state["method"])
    rows = learned or key_queues(state["method"])
    return Saved(
        config,
        int(state["position"]["total_steps"]),
        channels,
        pair.query.eval(),
        None if pair.key is None else pair.key.eval(),
        rows[0].float().clone() if len(rows) == 1 else None,
        bool(learned),
    )


def architecture_of(config: Config) -> BackboneConfig:
    """The backbone of a run without the weights that it began with."""
    # The tag of a name says where they began, and they are others now.
    return replace(config.backbone, name=config.backbone.name.partition(".")[0], init="", apex="off")


def random_backbone(config: Config, channels: int) -> nn.Module:
    """The backbone of a run with random weights: those that the run began with, unless it began with trained ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.trainer.seed)
        return build_backbone(architecture_of(config), channels).eval()


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, but for the further sets of BatchNorms, of which evaluation takes the first."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix) and ".further." not in f".{name}"
    }
