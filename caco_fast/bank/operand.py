"""The copy of a bank that the compiled kernels read, kept by the bank itself.

The kernels multiply with the bank's unit rows in bf16 or fp16. Making them reads the whole bank, so a bank keeps them
in one buffer from step to step, and whoever writes the bank writes that buffer too. A captured step then reads and
writes it in place. Without kernels there is no copy, and every method here is a no-op.

Legend: R query rows, K bank rows, C channels, P padded channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from caco_fast.ops import dispatch


class OperandCopy(nn.Module):
    """Unit rows of a bank [K, C] as the kernels read them, and what they were made of.

    The first queries that attend decide the dtype. backend: of the bank operations. No checkpoint holds the copy. A
    write by others is noticed by the bank's version counter at the next call from Python; neither the replay of a CUDA
    graph nor compiled code looks at it, so after such a write call `refresh`.
    """

    rows: Tensor | None  # [K, P]

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.register_buffer("rows", None, persistent=False)
        self._made_of: tuple[int, int] | None = None
        # Some GPUs have products in fp16 only, which then serve all queries.
        self._serves_all = False

    def for_attend(self, bank: Tensor, queries: Tensor) -> Tensor | None:
        """The copy as `bank_attend` and `bank_step_` take it, or None if they have to convert the bank themselves."""
        if torch.compiler.is_compiling():
            return self.rows if self._suits(queries) else None
        kernels = self._kernels(bank)
        if kernels is None:
            return None
        # A buffer made during a capture would hold nothing before the first replay.
        if self.rows is None and not kernels.capturing(bank.device):
            target = kernels.target_for(bank.device)
            self.rows = kernels.empty_operand(bank, kernels.operand_dtype(queries, target))
            self._serves_all = not target.takes_bfloat16
        return self._current(bank, kernels) if self._suits(queries) else None

    def for_select(self, bank: Tensor) -> Tensor | None:
        """The copy in whatever dtype it has, or None: `bank_select` settles near ties in f32."""
        if torch.compiler.is_compiling():
            return self.rows
        kernels = self._kernels(bank)
        return None if kernels is None or self.rows is None else self._current(bank, kernels)

    def is_current(self, bank: Tensor) -> bool:
        return self.rows is not None and not bank.is_inference() and self._made_of == made_of(bank)

    def written(self, bank: Tensor) -> None:
        """Say that the copy is that of the bank as it now is."""
        self._made_of = made_of(bank)

    def refresh(self, bank: Tensor, at: slice | Tensor | None = None) -> None:
        """Make the copy anew after a write to the bank. at: the rows written, if the copy was current before that."""
        kernels = self._kernels(bank)
        if self.rows is None or kernels is None:
            return
        target = kernels.target_for(bank.device)
        if at is None:
            kernels.write_operand(self.rows, bank, unit=True, target=target)
        else:
            self.rows[at] = kernels.unit_operand(bank[at], self.rows.dtype, target)
        # A capture runs nothing: a copy that was not current before is so only after the first replay.
        stale = at is None and kernels.capturing(bank.device)
        self._made_of = None if stale else made_of(bank)

    def _current(self, bank: Tensor, kernels: Any) -> Tensor | None:
        if not self.is_current(bank):
            if kernels.capturing(bank.device):
                return None
            self.refresh(bank)
        return self.rows

    def _suits(self, queries: Tensor) -> bool:
        """Whether products of these queries run in the dtype of the copy."""
        if self.rows is None:
            return False
        return self._serves_all or (queries.dtype == torch.float16) == (self.rows.dtype == torch.float16)

    def _kernels(self, bank: Tensor) -> Any:
        """The compiled kernels if they serve this bank. An inference tensor counts no versions, so it has no copy."""
        if bank.is_inference() or not dispatch.served_by_kernels(self.backend, bank.device, bank.dtype):
            return None
        return dispatch.cuda_backend()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OperandCopy":
        # On another device or in another dtype the bank gets another copy.
        self.rows = self._made_of = None
        super()._apply(fn, recurse)
        return self


def made_of(bank: Tensor) -> tuple[int, int]:
    """The bank's place in memory and its number of writes."""
    return bank.data_ptr(), bank._version
