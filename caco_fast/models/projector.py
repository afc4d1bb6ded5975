"""The projection head: an MLP from backbone features to the embedding."""

from dataclasses import dataclass

from torch import nn

from caco_fast.settings import require_at_least, setting


@dataclass(frozen=True)
class ProjectorConfig:
    layers: int = setting(3, "linear layers; 3 in CaCo, 2 in MoCo v2")
    hidden: int = setting(2048, "width of the hidden layers")
    dim: int = setting(256, "C, the size of the embedding and of a bank row")
    batch_norm: bool = setting(True, "BatchNorm after every hidden layer (never after the last)")
    bias: bool = setting(False, "bias in the linear layers")

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "dim"):
            require_at_least(f"projector.{name}", getattr(self, name), 1)


def build_projector(config: ProjectorConfig, features: int) -> nn.Sequential:
    """Linear, BatchNorm and ReLU `layers - 1` times, then Linear: [B, features] to [B, dim] (paper, section V-A)."""
    modules: list[nn.Module] = []
    width = features
    for _ in range(config.layers - 1):
        modules.append(nn.Linear(width, config.hidden, bias=config.bias))
        if config.batch_norm:
            modules.append(nn.BatchNorm1d(config.hidden))
        modules.append(nn.ReLU(inplace=True))
        width = config.hidden
    modules.append(nn.Linear(width, config.dim, bias=config.bias))
    return nn.Sequential(*modules)
