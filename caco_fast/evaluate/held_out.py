"""The method's own loss on images that are held out of training: what can be evaluated without labels."""

from collections.abc import Callable

import torch
from torch import Tensor

from caco_fast.data import TrainLoader
from caco_fast.distributed import all_reduce_sum, world_size
from caco_fast.evaluate.evaluator import EvaluationConfig
from caco_fast.evaluate.features import evaluation_mode
from caco_fast.methods import Method
from caco_fast.models import EncoderPair


class HeldOut:
    """The loss and the metrics of the method on the held-out images, in the same views every time.

    Nothing that training depends on changes: the modules are in evaluation mode, and no bank records a row. Every rank
    takes its share of each batch, and every rank must call `measure`.
    """

    def __init__(self, config: EvaluationConfig, open_loader: Callable[[], TrainLoader], device: torch.device) -> None:
        """`open_loader` makes the loader of the held-out images, whose workers live as long as an evaluation."""
        self.config = config
        self.open_loader = open_loader
        self.device = device

    def due(self, epochs_done: int, last: bool) -> bool:
        return self.config.due(epochs_done, last)

    @torch.no_grad()
    def measure(self, method: Method, encoders: EncoderPair) -> dict[str, float]:
        """The means over all batches: {"held_out_loss": ..., "held_out_positive_probability": ..., ...}."""
        sums: dict[str, Tensor] = {}
        loader = self.open_loader()
        try:
            with evaluation_mode(method, encoders):
                for batch in loader.batches(epoch=0):
                    views = [
                        view.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                        for view in batch.views
                    ]
                    output = method.loss(method.embed(views, encoders), record=False)
                    for name, value in {"loss": output.loss, **output.metrics}.items():
                        sums[name] = sums.get(name, 0.0) + value.double()
        finally:
            loader.close()
        batches = loader.steps_per_epoch * world_size()
        return {f"held_out_{name}": float(all_reduce_sum(value)) / batches for name, value in sums.items()}


def describe(values: dict[str, float]) -> str:
    """The values as a part of a log line: "held-out loss 4.21, positive probability 0.0123"."""
    shown = (f"{name.removeprefix('held_out_').replace('_', ' ')} {value:.4g}" for name, value in values.items())
    return f"held-out {', '.join(shown)}" if values else ""
