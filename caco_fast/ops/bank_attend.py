"""bank_attend: softmax attention of query rows over a bank that is both keys and values.

    s_ij = q_i . u_j,  u_j = w_j / |w_j|
    lse_i = log sum_j exp(s_ij / t),  mean_row_i = sum_j softmax_j(s_ij / t) u_j

so a contrastive loss and its gradient need no second pass: d lse_i / d q_i = mean_row_i / t.

Kernels  csrc/bank_attend/
Tests    tests/ops/test_bank_attend.py
Time     python tools/bench/ops.py bank_attend
Keep     the errors within tests/ops/tolerances.py; the same bits from launch to launch; no [R, K] in memory; a running
         maximum, so that queries of any length and any temperature are right; the host never waits for the device
Free     tile shapes, the split of the bank over blocks and its merge, the order of sums, the dtype of products

Legend: R query rows, K bank rows, C channels, P padded channels; a tile is r query rows by k bank rows.
"""

from typing import Any, overload

import torch
from torch import Tensor

from caco_fast.ops import dispatch
from caco_fast.ops.tiling import LOG2_E, f32_products, make_tiles, operand_dtype, product, unit_rows

OP = "bank_attend"


@overload
def bank_attend(
    queries: Tensor, bank: Tensor, temperature: float, backend: str = "auto", *, operand: Tensor | None = None
) -> tuple[Tensor, Tensor]: ...
@overload
def bank_attend(
    queries: Tensor,
    bank: Tensor,
    temperature: tuple[float, float],
    backend: str = "auto",
    *,
    operand: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]: ...
def bank_attend(
    queries: Tensor,  # [R, C]
    bank: Tensor,  # [K, C]
    temperature: float | tuple[float, float],
    backend: str = "auto",
    *,
    operand: Tensor | None = None,  # [K, P]
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:  # lse [R], mean_row [R, C]
    """Log-sum-exp of the similarities to all bank rows, and the softmax-weighted mean of the unit bank rows.

    queries: any length (they are not normalised here), f32, bf16, fp16, or f64 with an f64 bank.
    bank: f32, rows of any length but zero; a constant: no gradient flows into it.
    temperature: above 0. With a pair, lse is a pair too; mean_row and the gradient belong to the first, and the second
        lse carries no gradient. Both share one product of similarities.
    operand: the bank's unit rows as the kernels read them, if the caller keeps them equal to the bank (a
        `LearnableBank` does); products then run in its dtype. Other backends do not read it.

    Returns f32 (f64 for f64). lse is differentiable once in queries; mean_row is not differentiable.
    Raises ValueError or TypeError for a bad argument, RuntimeError if the named backend is not there.
    Source: CaCo, eq. 3 and 8.
    """
    dispatch.check_backend(OP, backend)
    dispatch.check_rows_and_bank(OP, "queries", queries, bank)
    dispatch.check_operand(OP, operand, bank)
    temperatures = [float(t) for t in temperature] if isinstance(temperature, (tuple, list)) else [float(temperature)]
    if len(temperatures) not in (1, 2):
        raise ValueError(f"{OP}: temperature: found {len(temperatures)} values, expected one or two")
    for value in temperatures:
        dispatch.check_temperature(OP, value)
    shared = len(temperatures) == 2 and temperatures[0] == temperatures[1]
    different = temperatures[:1] if shared else temperatures
    lse, other_lse, mean_row = torch.ops.caco_fast.bank_attend(queries, bank, different, operand, backend)
    if len(temperatures) == 1:
        return lse, mean_row
    return (lse, lse.detach() if shared else other_lse), mean_row


@f32_products()
def attend_reference(queries: Tensor, bank: Tensor, temperatures: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, dense."""
    rows = queries.to(bank.dtype)  # [R, C]
    unit, _ = unit_rows(bank)  # [K, C]
    similarity = rows @ unit.T  # [R, K]
    lse = [torch.logsumexp(similarity / t, dim=1) for t in temperatures]  # [R] each
    mean_row = torch.softmax(similarity / temperatures[0], dim=1) @ unit  # [R, C]
    return lse[0], lse[1] if len(lse) == 2 else lse[0].new_empty(0), mean_row


@f32_products()
def attend_tiled(queries: Tensor, bank: Tensor, temperatures: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch over tiles, with a running maximum: right for queries of any length and any temperature."""
    rows, channels = queries.shape
    dtype = operand_dtype(queries)
    queries = queries.to(dtype).contiguous()
    tiles = make_tiles(rows, bank)
    top = bank.new_full((rows, 1), -torch.inf)
    total = [bank.new_zeros((rows, 1)) for _ in temperatures]
    mean_row = bank.new_zeros((rows, channels))
    scales = [LOG2_E / t for t in temperatures]

    for bank_span in tiles.bank_rows:
        unit = unit_rows(bank[bank_span])[0].to(dtype)  # [k, C]
        for span in tiles.rows:
            similarity = product(queries[span], unit.T)  # [r, k]
            old_top = top[span]
            new_top = torch.maximum(old_top, similarity.amax(dim=1, keepdim=True))  # [r, 1]
            # The first temperature comes last: it may overwrite the similarities, and its weights are used below.
            for n in reversed(range(len(scales))):
                weights = tiles.scratch_for(similarity, in_place=n == 0)  # [r, k]
                torch.add(new_top * -scales[n], similarity, alpha=scales[n], out=weights).exp2_()
                fade = ((old_top - new_top) * scales[n]).exp2_()  # [r, 1]
                total[n][span] = total[n][span] * fade + weights.sum(dim=1, keepdim=True)
            part = product(weights.to(dtype), unit)  # [r, C]
            torch.addcmul(part.to(bank.dtype), mean_row[span], fade, out=mean_row[span])
            top[span] = new_top

    lse = [(sums.log() + top / t).squeeze(1) for sums, t in zip(total, temperatures, strict=True)]  # [R] each
    mean_row /= total[0]
    return lse[0], lse[1] if len(lse) == 2 else lse[0].new_empty(0), mean_row


def attend_cuda(
    queries: Tensor, bank: Tensor, temperatures: list[float], operand: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernels: Any = dispatch.cuda_backend()
    kernels.check_bank(OP, bank)
    (rows, channels), bank_rows = queries.shape, bank.shape[0]
    lse = bank.new_empty((len(temperatures), rows))
    mean_row = bank.new_empty((rows, channels))
    if rows > 0:
        target = kernels.target_for(bank.device)
        operand = kernels.operand_for(queries, bank, operand, target)
        size = kernels._C.bank_attend_workspace(rows, bank_rows, channels, target)
        kernels.launch(
            "bank_attend",
            target,
            queries=kernels.row_operand(queries, operand.dtype, target),
            bank=operand,
            lse=lse,
            mean_row=mean_row,
            workspace=kernels.workspace(size, bank),
            rows=rows,
            bank_rows=bank_rows,
            channels=channels,
            type=operand.dtype,
            temperatures=temperatures,
        )
    return lse[0], lse[1].clone() if len(temperatures) == 2 else bank.new_empty(0), mean_row


@torch.library.custom_op("caco_fast::bank_attend", mutates_args=())
def _bank_attend(
    queries: Tensor, bank: Tensor, temperatures: list[float], operand: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse [R], lse at the second temperature [R] or [0], mean_row [R, C])"""
    chosen = dispatch.resolve(OP, backend, bank.device, bank.dtype)
    # Autocast would turn the f32 products into bf16 ones.
    with torch.autocast(bank.device.type, enabled=False):
        if chosen == "cuda":
            return attend_cuda(queries, bank, temperatures, operand)
        if chosen == "tiled":
            return attend_tiled(queries, bank, temperatures)
        return attend_reference(queries, bank, temperatures)


@_bank_attend.register_fake
def _(
    queries: Tensor, bank: Tensor, temperatures: list[float], operand: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = queries.shape
    second = rows if len(temperatures) == 2 else 0
    return bank.new_empty(rows), bank.new_empty(second), bank.new_empty((rows, channels))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, _, temperatures, _, _ = inputs
    _, other_lse, mean_row = output
    ctx.mark_non_differentiable(other_lse, mean_row)
    ctx.save_for_backward(mean_row)
    ctx.temperature, ctx.dtype = temperatures[0], queries.dtype


def _backward(ctx: Any, grad_lse: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{OP}: found create_graph=True, expected a first derivative: lse is differentiable once"
        )
    (mean_row,) = ctx.saved_tensors  # [R, C]
    grad_queries = mean_row * (grad_lse / ctx.temperature).unsqueeze(1)
    return grad_queries.to(ctx.dtype), None, None, None, None


_bank_attend.register_autograd(_backward, setup_context=_setup_context)
