"""A step of training as a CUDA graph: captured once, and from then on replayed without the host's launches.

A replay runs the kernels of the captured step at their addresses, with the numbers that the host gave them then. So
views and the schedule's rates are copied into tensors that stay, everything that a step leaves behind is written in
place, and nothing in it may depend on a value that the host reads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from caco_fast.distributed import is_distributed
from caco_fast.engine.settings import TrainerConfig
from caco_fast.engine.state import Rates
from caco_fast.errors import UserError

# Steps before the capture, in which libraries load and states are made. DistributedDataParallel times itself in its
# first ten, with events that no graph may hold.
WARMUP_STEPS, WARMUP_STEPS_OF_RANKS = 3, 11


class Capture(Protocol):
    """How the work of a device is captured."""

    def aside(self) -> AbstractContextManager[None]:
        """A context in which work runs where it will be captured."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats the launches of `work`, which are not carried out now."""


class CudaCapture:
    """By a CUDA graph, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: those of the loader and of NCCL go on allocating and asking for events.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"trainer.cuda_graph: the step can't be captured ({reason}); set it to off") from error
        return graph.replay


class StepGraph:
    """Steps of training: the first `warmup` launch by launch, then one captured, and it and all further ones replayed.

    Views must keep their shapes. Whoever replaces a tensor that the step writes to must call `reset`.
    """

    def __init__(self, device: torch.device, capture: Capture, warmup: int) -> None:
        self.device = device
        self.warmup = warmup
        self._capture = capture
        # torch's fused optimisers read the lr in f32. The others are in f64, so that what is computed of them, such as
        # 1 - momentum, is what the host would compute.
        zeros = [torch.zeros((), dtype=d, device=device) for d in (torch.float32, torch.float64, torch.float64)]
        self._rates = Rates(*zeros)
        self._views: list[torch.Tensor] = []
        self.reset()

    def reset(self) -> None:
        self._left, self._replay = self.warmup, None

    def aside(self) -> AbstractContextManager[None]:
        """DistributedDataParallel must be made within, since it ties the gradients' sums to the stream of then."""
        return self._capture.aside()

    def __call__(
        self, work: Callable[[Sequence[torch.Tensor], Rates], None], views: Sequence[torch.Tensor], rates: Rates
    ) -> None:
        """One step: `work` on these views at these rates, or what was captured of it."""
        self._take(views, rates)
        if self._left > 0:
            self._left -= 1
            with self.aside():
                work(self._views, self._rates)
            return
        if self._replay is None:
            self._replay = self._capture.capture(lambda: work(self._views, self._rates))
        self._replay()

    def _take(self, views: Sequence[torch.Tensor], rates: Rates) -> None:
        if not self._views:
            like = dict(device=self.device, memory_format=torch.channels_last)
            self._views = [torch.empty_like(view, **like) for view in views]
        for kept, view in zip(self._views, views, strict=True):
            kept.copy_(view, non_blocking=True)
        for kept, rate in zip(self._rates, rates):
            kept.fill_(rate)


def build_step_graph(config: TrainerConfig, device: torch.device) -> StepGraph | None:
    """That of the settings; None where they want none.

    Raises:
        UserError: on another device than a GPU.
    """
    if not config.cuda_graph:
        return None
    if device.type != "cuda":
        raise UserError(f"trainer.cuda_graph: it needs a GPU, found {device}; set it to off")
    return StepGraph(device, CudaCapture(device), WARMUP_STEPS_OF_RANKS if is_distributed() else WARMUP_STEPS)
