"""bank_select: the most similar bank row of each key, argmax_j k_i . u_j with u_j = w_j / |w_j|.

Legend: R key rows, K bank rows, C channels; a tile is r key rows by k bank rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from caco_fast.ops import backends, checks
from caco_fast.ops.tiling import make_tiles, product, spans, unit_rows

OP = "bank_select"

# Neighbouring bank rows that are scored as one. Torch's reductions of 32 neighbours are fast, those of 16 are not.
GROUP = 32
# Keys that are settled at a time, such that their 64 candidate rows each stay in a cache, or fill a device.
CPU_SETTLE_ROWS, DEVICE_SETTLE_ROWS = 16, 1024


def bank_select(keys: Tensor, bank: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:  # [R, C], [K, C]
    """Index [R] int64 of the most similar bank row and its similarity [R] f32 (f64 for f64); ties to the lowest index.

    keys: f32, bf16, fp16, or f64 with an f64 bank. The answer is that of f32 arithmetic whatever the keys' dtype is.
    bank: f32, rows of any length but zero. Nothing here is differentiable.

    Raises ValueError or TypeError for a bad argument, RuntimeError if the named backend is not there.
    Source: CaCo, eq. 11.
    """
    checks.check_backend(OP, backend)
    checks.check_rows_and_bank(OP, "keys", keys, bank)
    # The bank itself where it can be: the CUDA backend knows it again, and keeps its operand copy.
    return torch.ops.caco_fast.bank_select(keys.detach(), bank.detach() if bank.requires_grad else bank, backend)


def select_reference(keys: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """As the formula, dense."""
    unit, _ = unit_rows(bank)  # [K, C]
    similarity, index = (keys.to(bank.dtype) @ unit.T).max(dim=1)  # torch.max gives the first of equal values
    return index, similarity


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
            # torch.max gives the first of equal values, and earlier rows stand first.
            scores = torch.cat([score[span], best], dim=1)
            first, first_at = scores.max(dim=1, keepdim=True)  # [r, 1]
            second, second_at = scores.scatter_(1, first_at, -torch.inf).max(dim=1, keepdim=True)
            groups = torch.cat([group[span], starts.expand(best.shape)], dim=1)
            score[span] = torch.cat([first, second], dim=1)
            group[span] = groups.gather(1, torch.cat([first_at, second_at], dim=1))
    return settle(keys, bank, group)


def settle(keys: Tensor, bank: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows in two groups [R, 2] the most similar one, by plain dot products; ties to the lowest index."""
    rows = keys.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device=bank.device)
    similarity = bank.new_empty(rows)
    members = torch.arange(GROUP, device=bank.device)
    for span in spans(rows, CPU_SETTLE_ROWS if bank.device.type == "cpu" else DEVICE_SETTLE_ROWS):
        candidates = (group[span].sort(dim=1).values.unsqueeze(2) + members).flatten(1)  # [r, 2 GROUP]
        # The last group of the bank may be short: its last row then stands in for the rows that are not there.
        candidates.clamp_max_(bank.shape[0] - 1)
        candidate_rows = bank[candidates]  # [r, 2 GROUP, C]
        norm = torch.linalg.vector_norm(candidate_rows, dim=2)
        exact = torch.linalg.vecdot(candidate_rows, keys[span].unsqueeze(1)) / norm.masked_fill_(norm == 0, torch.inf)
        best, at = exact.max(dim=1, keepdim=True)
        index[span] = candidates.gather(1, at).squeeze(1)
        similarity[span] = best.squeeze(1)
    return index, similarity


@torch.library.custom_op("caco_fast::bank_select", mutates_args=())
def _bank_select(keys: Tensor, bank: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    chosen = backends.resolve(OP, backend, bank.device, bank.dtype)
    # Autocast would turn the f32 products into bf16 ones.
    with torch.autocast(bank.device.type, enabled=False):
        if chosen == "cuda":
            return backends.cuda_backend().select(keys, bank)
        if chosen == "tiled":
            return select_tiled(keys, bank)
        return select_reference(keys, bank)


@_bank_select.register_fake
def _(keys: Tensor, bank: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    rows = keys.shape[0]
    return bank.new_empty(rows, dtype=torch.int64), bank.new_empty(rows)
