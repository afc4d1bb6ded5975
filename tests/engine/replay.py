"""CUDA graphs on the CPU, for tests: operations are recorded, and a replay runs them into the same memory.

As with a graph, what the host computes in between is computed once: numbers, branches and addresses stay as they were
when they were recorded, and the recording itself leaves nothing changed.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, partialmethod
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

# Operations whose result the host must have, or whose shape only the values tell.
WAITS = "_local_scalar_dense item is_nonzero equal nonzero nonzero_numpy argwhere masked_select bincount unique_dim"
WAITS = {f"aten.{name}.default" for name in WAITS.split()} | {"aten.where.default", "aten._unique2.default"}
WAITS |= {"aten.repeat_interleave.Tensor", "aten.repeat_interleave.self_Tensor"}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
MASKS = (torch.bool, torch.uint8)
# The ways to the host that are no operation where a tensor is on the CPU.
METHODS = ("tolist", "numpy", "cpu")


class HostWait(Exception):
    """On a GPU the host would wait for the device here."""


def refuse(tensor: Tensor, name: str) -> None:
    raise HostWait(name)


class NoHostWaits(TorchDispatchMode):
    """Raises HostWait at an operation that makes the host wait; sees into the operations of caco_fast."""

    def __init__(self) -> None:
        super().__init__()
        self._patches: list[pytest.MonkeyPatch] = []

    def __enter__(self) -> "NoHostWaits":
        self._patches.append(pytest.MonkeyPatch())
        for name in METHODS:
            self._patches[-1].setattr(Tensor, name, partialmethod(refuse, name))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._patches.pop().undo()
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.see((args, kwargs))
        if func.namespace == "caco_fast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        indexing = func.overloadpacket.__name__ in INDEXING
        # DistributedDataParallel keeps in main memory, in int32, which parameters were used.
        on_the_host = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.int32
        masked = indexing and any(t is not None and t.dtype in MASKS for t in args[1])
        if masked or (str(func) in WAITS and not on_the_host):
            raise HostWait(str(func))
        return self.run(func, args, kwargs)

    def see(self, arguments: Any) -> None:
        pass

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class Recording(NoHostWaits):
    """What runs while it is entered."""

    entered: "Recording | None" = None

    def __init__(self) -> None:
        super().__init__()
        # Each with its arguments and those of its results that lie in memory of their own.
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[tuple[int, Tensor]]]] = []
        # Memory from the block, and from outside as it was when the block first came by it.
        self._made: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> "Recording":
        Recording.entered = self
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        Recording.entered = self if self._patches else None

    def see(self, arguments: Any) -> None:
        for tensor in tensors(arguments):
            if memory(tensor) not in self._made and memory(tensor) not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[memory(tensor)] = whole, whole.clone()

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise AssertionError(f"{func} draws random numbers, which a replay would repeat")
        given = {memory(t) for t in tensors((args, kwargs))}
        results = func(*args, **kwargs)
        fresh = [(at, t.detach()) for at, t in enumerate(tensors(results)) if memory(t) not in given]
        self._made |= {memory(tensor): tensor for _, tensor in fresh}
        # A graph does not clear memory that it hands out.
        if "empty" not in func.overloadpacket.__name__:
            # Detached, or they would keep this step's backward pass.
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            self.calls.append((func, args, kwargs, fresh))
        return results

    def restore(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, fresh in self.calls:
            results = func(*args, **kwargs)
            if "c10d" in str(func):
                # In the order of a stream.
                dist.Work.unbox(tree_flatten(results)[0][-1]).wait()
            for at, kept in fresh:
                kept.copy_(tensors(results)[at])


class RecordedKernels:
    """The module of the compiled kernels, whose launches are recorded too."""

    LAUNCHES = ("bank_operand", "bank_attend", "bank_select", "bank_step")
    LAUNCHES += ("write_tensor_table", "ema_update", "lars_step")

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        return partial(self._launch, name) if name in self.LAUNCHES else getattr(self._kernels, name)

    def _launch(self, name: str, *args: Any, **kwargs: Any) -> None:
        launch = getattr(self._kernels, name)
        launch(*args, **kwargs)
        if Recording.entered is not None:
            Recording.entered.calls.append((launch, args, kwargs, []))


class Recorder:
    """A `Capture` of the CPU; `replays` counts."""

    def __init__(self) -> None:
        self.replays = 0

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        recording = Recording()
        with recording:
            work()
        recording.restore()

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
