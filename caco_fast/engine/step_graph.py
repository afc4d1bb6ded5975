"""A training step as a CUDA graph: captured once, then replayed without launches by the host.

A replay runs the kernels of the captured step on the same addresses and with the same numbers. Therefore views and the
schedule's rates are copied into tensors that stay, and all results of a step are written in place. Nothing in a step
may depend on a value that the host reads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from caco_fast.distributed import is_distributed
from caco_fast.engine.settings import TrainerConfig
from caco_fast.engine.step import Rates, TrainStep
from caco_fast.errors import UserError
from caco_fast.methods import Phase

# Steps before the capture, in which libraries load and states are made. DistributedDataParallel times itself in its
# first ten, with events that no graph may hold.
WARMUP_STEPS, WARMUP_STEPS_OF_RANKS = 3, 11


class Capture(Protocol):
    """How the work of a device is captured."""

    def aside(self) -> AbstractContextManager[None]:
        """A context in which work runs where it will be captured."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the launches of `work` without running them, and return a function that repeats them."""


class CudaCapture:
    """Capture by a CUDA graph, on a stream of its own."""

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
            # Only the work of this thread: the threads of the loader and of NCCL allocate and query events meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"trainer.cuda_graph: the step can't be captured ({reason}); set it to false") from error
        return graph.replay


class CapturedStep(TrainStep):
    """A step that is launched `warmup` times at the beginning of a phase, and then captured and replayed.

    Views must keep their shapes. A caller that replaces a tensor which the step writes to must call `reset`. In a phase
    that can't be captured every step is launched.
    """

    def __init__(self, *parts: Any, capture: Capture, warmup: int, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.warmup = warmup
        self._capture = capture
        # torch's fused optimisers read the lr in f32. The others are in f64, so that what is computed from them, such
        # as 1 - momentum, is what the host would compute.
        dtypes = (torch.float32, torch.float64, torch.float64)
        self._rates = [torch.zeros((), dtype=dtype, device=self.device) for dtype in dtypes]
        self._views: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the captured step; the next steps warm up again."""
        self._left, self._replay = self.warmup, None

    def enter(self, phase: Phase) -> None:
        self.reset()
        super().enter(phase)

    def aside(self) -> AbstractContextManager[None]:
        # DistributedDataParallel ties the gradients' sums to the stream that it is made on, and torch keeps the memory
        # of each stream apart.
        return self._capture.aside()

    def _launch(self, views: Sequence[Tensor], rates: Rates) -> None:
        if not self._phase.capturable:
            super()._launch(views, rates)
            return
        self._take(views, rates)
        if self._left > 0:
            self._left -= 1
            with self.aside():
                self.compute(self._views, Rates(*self._rates))
            return
        if self._replay is None:
            self._replay = self._capture.capture(lambda: self.compute(self._views, Rates(*self._rates)))
        self._replay()

    def _take(self, views: Sequence[Tensor], rates: Rates) -> None:
        """Copy views and rates into the tensors that the captured step reads."""
        if not self._views:
            self._views = [
                torch.empty_like(view, device=self.device, memory_format=torch.channels_last) for view in views
            ]
        for kept, view in zip(self._views, views, strict=True):
            kept.copy_(view, non_blocking=True)
        for kept, rate in zip(self._rates, rates):
            kept.fill_(rate)


def build_capture(config: TrainerConfig, device: torch.device) -> tuple[Capture, int] | None:
    """The capture that the settings ask for and its warm-up steps, or None.

    Raises:
        UserError: the device is not a GPU.
    """
    if not config.cuda_graph:
        return None
    if device.type != "cuda":
        raise UserError(f"trainer.cuda_graph: it needs a GPU, found {device}; set it to false")
    return CudaCapture(device), WARMUP_STEPS_OF_RANKS if is_distributed() else WARMUP_STEPS
