"""The projection head, an MLP from backbone features to the embedding, and the MLP that predictors are made of."""

from dataclasses import dataclass

from torch import nn

from caco_fast.errors import UserError
from caco_fast.settings import require_at_least, setting

LAST_BATCH_NORMS = ("none", "affine", "plain")


@dataclass(frozen=True)
class ProjectorConfig:
    layers: int = setting(3, "linear layers; 3 in CaCo, 2 in MoCo v2")
    hidden: int = setting(2048, "width of the hidden layers")
    dim: int = setting(256, "C, the size of the embedding and of a bank row")
    batch_norm: bool = setting(True, "BatchNorm after every hidden layer")
    last_batch_norm: str = setting(
        "none", "BatchNorm after the last layer: none, affine (SimCLR, NNCLR), or plain: without weights of its own"
    )
    bias: bool = setting(False, "bias in the linear layers")

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "dim"):
            require_at_least(f"projector.{name}", getattr(self, name), 1)
        if self.last_batch_norm not in LAST_BATCH_NORMS:
            found = f"found '{self.last_batch_norm}', expected one of {', '.join(LAST_BATCH_NORMS)}"
            raise UserError(f"projector.last_batch_norm: {found}")


def build_projector(config: ProjectorConfig, features: int) -> nn.Sequential:
    """The head of the settings: [B, features] to [B, dim] (paper, section V-A)."""
    widths = [features, *[config.hidden] * (config.layers - 1), config.dim]
    return build_mlp(widths, batch_norm=config.batch_norm, last_batch_norm=config.last_batch_norm, bias=config.bias)


def build_mlp(
    widths: list[int], *, batch_norm: bool = True, last_batch_norm: str = "none", bias: bool = False
) -> nn.Sequential:
    """Linear, BatchNorm and ReLU for every hidden width, then Linear and the last BatchNorm: [B, first] to [B, last].

    widths: of the input, the hidden layers and the output. last_batch_norm: none, affine or plain. A plain one
    normalises only: its weight stays 1 and its bias 0.
    """
    modules: list[nn.Module] = []
    *hidden, last = widths[1:]
    width = widths[0]
    for following in hidden:
        modules.append(nn.Linear(width, following, bias=bias))
        if batch_norm:
            modules.append(nn.BatchNorm1d(following))
        modules.append(nn.ReLU(inplace=True))
        width = following
    modules.append(nn.Linear(width, last, bias=bias))
    if last_batch_norm != "none":
        # With weights even if it is plain, so that the form over all ranks, the EMA and checkpoints need no other case.
        modules.append(nn.BatchNorm1d(last).requires_grad_(last_batch_norm == "affine"))
    return nn.Sequential(*modules)
