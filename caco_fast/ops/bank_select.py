"""bank_select: the most similar bank row of each key, argmax_j k_i . u_j with u_j = w_j / |w_j|.

Kernels  csrc/bank_select/
Tests    tests/ops/test_bank_select.py
Time     python tools/bench/ops.py bank_select
Keep     errors within tests/ops/tolerances.py; ties to the lowest index; near ties settled in f32 whatever the products
         run in; the same bits from launch to launch; no [R, K] in memory; the host never waits for the device
Free     tile shapes, the split of the bank over blocks, the number of candidates to settle, the dtype of products

Legend: R key rows, K bank rows, C channels, P padded channels; a tile is r key rows by k bank rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from caco_fast.ops import dispatch
from caco_fast.ops.tiling import f32_products, make_tiles, product, spans, unit_rows

OP = "bank_select"

# Neighbouring bank rows that are scored as one. Torch's reductions of 32 neighbours are fast, those of 16 are not.
GROUP = 32
# Keys that are settled at a time, such that their 64 candidate rows each stay in a cache, or fill a device.
CPU_SETTLE_ROWS, DEVICE_SETTLE_ROWS = 16, 1024


def bank_select(
    keys: Tensor,  # [R, C]
    bank: Tensor,  # [K, C]
    backend: str = "auto",
    *,
    operand: Tensor | None = None,  # [K, P]
) -> tuple[Tensor, Tensor]:
    """Index [R] int64 of the most similar bank row and its similarity [R] f32 (f64 for f64); ties to the lowest index.

    keys: f32, bf16, fp16, or f64 with an f64 bank. The answer is that of f32 arithmetic whatever the keys' dtype is.
    bank: f32, rows of any length but zero. Nothing here is differentiable.
    operand: as in `bank_attend`.

    Raises ValueError or TypeError for a bad argument, RuntimeError if the named backend is not there.
    Source: CaCo, eq. 11.
    """
    dispatch.check_backend(OP, backend)
    dispatch.check_rows_and_bank(OP, "keys", keys, bank)
    dispatch.check_operand(OP, operand, bank)
    index, similarity = torch.ops.caco_fast.bank_select(keys.detach(), bank.detach(), operand, backend)
    return index, similarity


@f32_products()
def select_reference(keys: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, dense."""
    unit, _ = unit_rows(bank)  # [K, C]
    similarity, index = (keys.to(bank.dtype) @ unit.T).max(dim=1)  # torch.max gives the first of equal values
    return index, similarity


@f32_products()
def select_tiled(keys: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch over tiles: the best two groups of rows by matrix product, then settled by plain f32 dot products.

    The scores may be TF32 or bf16 if the user told torch to multiply f32 matrices so; the true row is then still in one
    of the groups. bf16 keys are widened first: the bf16 scores that a CPU gives are so coarse that many rows tie.
    """
    rows = keys.shape[0]
    keys = keys.to(bank.dtype).contiguous()
    tiles = make_tiles(rows, bank)
    score = bank.new_full((rows, 2), -torch.inf)  # the best two groups so far, best first
    group = torch.zeros((rows, 2), dtype=torch.int64, device=bank.device)  # the first bank row of each
    for bank_span in tiles.bank_rows:
        unit = unit_rows(bank[bank_span])[0]  # [k, C]
        count = unit.shape[0]
        unit = pad(unit, (0, 0, 0, -count % GROUP))
        starts = torch.arange(bank_span.start, bank_span.stop, GROUP, device=bank.device)  # [k / GROUP]
        for span in tiles.rows:
            similarity = product(keys[span], unit.T)  # [r, k]
            similarity[:, count:] = -torch.inf
            best = similarity.view(similarity.shape[0], -1, GROUP).amax(dim=2)  # [r, k / GROUP]
            # torch.max gives the first of equal values, and earlier rows come first.
            scores = torch.cat([score[span], best], dim=1)
            first, first_at = scores.max(dim=1, keepdim=True)  # [r, 1]
            second, second_at = scores.scatter_(1, first_at, -torch.inf).max(dim=1, keepdim=True)
            groups = torch.cat([group[span], starts.expand(best.shape)], dim=1)
            score[span] = torch.cat([first, second], dim=1)
            group[span] = groups.gather(1, torch.cat([first_at, second_at], dim=1))
    return settle(keys, bank, group)


@f32_products()
def settle(keys: Tensor, bank: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the most similar row of two groups [R, 2], by plain dot products; ties to the lowest index."""
    rows = keys.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device=bank.device)
    similarity = bank.new_empty(rows)
    members = torch.arange(GROUP, device=bank.device)
    for span in spans(rows, CPU_SETTLE_ROWS if bank.device.type == "cpu" else DEVICE_SETTLE_ROWS):
        candidates = (group[span].sort(dim=1).values.unsqueeze(2) + members).flatten(1)  # [r, 2 GROUP]
        # The last group of the bank may be short: its last row then replaces the missing ones.
        candidates.clamp_max_(bank.shape[0] - 1)
        candidate_rows = bank[candidates]  # [r, 2 GROUP, C]
        norm = torch.linalg.vector_norm(candidate_rows, dim=2)
        exact = torch.linalg.vecdot(candidate_rows, keys[span].unsqueeze(1)) / norm.masked_fill_(norm == 0, torch.inf)
        best, at = exact.max(dim=1, keepdim=True)
        index[span] = candidates.gather(1, at).squeeze(1)
        similarity[span] = best.squeeze(1)
    return index, similarity


def select_cuda(keys: Tensor, bank: Tensor, operand: Tensor | None) -> tuple[Tensor, Tensor]:
    kernels: Any = dispatch.cuda_backend()
    kernels.check_bank(OP, bank)
    (rows, channels), bank_rows = keys.shape, bank.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device=bank.device)
    similarity = bank.new_empty(rows)
    if rows > 0:
        target = kernels.target_for(bank.device)
        operand = kernels.operand_for(keys, bank, operand, target)
        size = kernels._C.bank_select_workspace(rows, bank_rows, channels, target)
        kernels.launch(
            "bank_select",
            target,
            keys=kernels.row_operand(keys, operand.dtype, target),
            bank=operand,
            exact_keys=keys.float().contiguous(),
            exact_bank=bank.contiguous(),
            index=index,
            similarity=similarity,
            workspace=kernels.workspace(size, bank),
            rows=rows,
            bank_rows=bank_rows,
            channels=channels,
            type=operand.dtype,
        )
    return index, similarity


@torch.library.custom_op("caco_fast::bank_select", mutates_args=())
def _bank_select(keys: Tensor, bank: Tensor, operand: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    chosen = dispatch.resolve(OP, backend, bank.device, bank.dtype)
    # Autocast would turn the f32 products into bf16 ones.
    with torch.autocast(bank.device.type, enabled=False):
        if chosen == "cuda":
            return select_cuda(keys, bank, operand)
        if chosen == "tiled":
            return select_tiled(keys, bank)
        return select_reference(keys, bank)


@_bank_select.register_fake
def _(keys: Tensor, bank: Tensor, operand: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    rows = keys.shape[0]
    return bank.new_empty(rows, dtype=torch.int64), bank.new_empty(rows)
