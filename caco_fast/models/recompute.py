"""Activations that are computed a second time in the backward pass instead of being kept: time for memory."""

from torch import nn

from caco_fast.errors import UserError
from caco_fast.models.batch_norm import SegmentedBatchNorm, mixes_views


def recompute_activations(encoder: nn.Module, name: str) -> None:
    """Let the backbone of an encoder keep only what enters its blocks, by timm's own switch.

    encoder: with a `backbone` of timm. name: of the architecture, for the error line.

    Raises:
        UserError: the architecture has no such switch, or a BatchNorm whose running statistics would count twice.
    """
    setting = "trainer.checkpoint_activations"
    switch = getattr(encoder.backbone, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AssertionError
        switch(True)
    except (AssertionError, NotImplementedError):
        raise UserError(
            f"{setting}: timm's {name} can't recompute its activations; set it to false, or take "
            "trainer.accumulate, a smaller trainer.batch_size or more ranks"
        ) from None
    for module in encoder.modules():
        if mixes_views(module) or (isinstance(module, SegmentedBatchNorm) and not module.joins_views):
            raise UserError(f"{setting}: {type(module).__name__} would count its statistics twice; set it to false")
        if isinstance(module, SegmentedBatchNorm):
            if module.further:
                raise UserError(f"{setting}: it does not go with a method that has several BatchNorm sets")
            module.recomputes = True
