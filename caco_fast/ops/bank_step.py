"""bank_step_: one momentum step of a learnable bank, in place.

With s_ij = q_i . u_j, u_j = w_j / |w_j|, p_ij = exp(s_ij / t - lse_i), row weights a_i, positives pi_im weighted o_im:

    c_ij = p_ij + sum_m o_im [j = pi_im] (1 - 2 p_ij)
    g_j  = - 1 / (t |w_j|) * sum_i a_i c_ij (q_i - s_ij u_j)
    V <- mu V + g + wd W ;  W <- W - eta V ;  and with norm "project" W_j <- W_j / |W_j|

All of the right-hand side is from before the step. As s_ij = q_i . u_j, the tangent needs one sum only:
sum_i a_i c_ij (q_i - s_ij u_j) = G_j - (G_j . u_j) u_j with G_j = sum_i a_i c_ij q_i.

Kernels  csrc/bank_step/
Tests    tests/ops/test_bank_step.py
Time     python tools/bench/ops.py bank_step
Keep     the errors within tests/ops/tolerances.py; the same bits from launch to launch, also if many rows share a
         positive; neither [R, K] nor a [K, C] gradient in memory; `skip` and `lr` read on the device; the operand that
         it writes is that of the bank as it then is; the host never waits for the device
Free     tile shapes, the order of tiles, the order of sums, the dtype of products, how positives are found

Legend: R query rows, K bank rows, C channels, P padded channels, M positives per row; a tile is k bank rows by r query
rows.
"""

import math
from typing import Any

import torch
from torch import Tensor

from caco_fast.ops import dispatch
from caco_fast.ops.rates import Rate, check_rate, on_device
from caco_fast.ops.tiling import LOG2_E, f32_products, make_tiles, operand_dtype, product, unit_rows

OP = "bank_step_"


def bank_step_(
    bank: Tensor,  # [K, C]
    velocity: Tensor,  # [K, C]
    queries: Tensor,  # [R, C]
    lse: Tensor,  # [R]
    *,
    temperature: float,
    lr: Rate,
    momentum: float,
    row_weight: Tensor,  # [R]
    positives: Tensor | None = None,  # [R, M] int64
    positive_weight: Tensor | None = None,  # [R, M]
    norm: str = "implicit",
    weight_decay: float = 0.0,
    skip: Tensor | None = None,  # []
    backend: str = "auto",
    operand: Tensor | None = None,  # [K, P]
) -> None:
    """Move the bank rows and their velocity; positives descend the contrastive loss and negatives ascend it.

    lse: `bank_attend` of the same queries and bank at `temperature`, the bank temperature t_m; larger if the softmax
        has further columns beside the bank.
    lr: eta; the value of a tensor [] on the device is not read by the host.
    row_weight: 1 / B for each of the rows of a batch of B images. positive_weight: sums to 1 over M; None means 1 / M.
    positives: None or M = 0 for AdCo (negatives only), M = 1 for CaCo. An index out of range is an IndexError on the
        CPU. On an accelerator the host does not read them, and the kernels ignore such an index.
    weight_decay: wd, of the raw rows W; a part of the velocity.
    norm: "implicit" keeps the rows' lengths as they come, "project" rescales every row to unit length after the step.
    skip: an f32 flag on the device, such as GradScaler's found_inf; if it is not 0, bank and velocity stay as they are.
    operand: the copy of the bank's unit rows that its owner passes to `bank_attend`; it is written anew from the bank
        after the step. The kernels' products run in its dtype.

    Raises ValueError, TypeError or IndexError for a bad argument, RuntimeError if the named backend is not there.
    Source: CaCo, eq. 7-10 and section IV-C; AdCo for M = 0.
    """
    dispatch.check_backend(OP, backend)
    dispatch.check_rows_and_bank(OP, "queries", queries, bank)
    check_like_bank(velocity, bank)
    rows = queries.shape[0]
    dispatch.check_like(OP, "lse", lse, (rows,), "[R]", bank)
    dispatch.check_like(OP, "row_weight", row_weight, (rows,), "[R]", bank)
    dispatch.check_temperature(OP, temperature)
    check_settings(lr, momentum, weight_decay, norm, bank.device)
    dispatch.check_flag(OP, "skip", skip, bank.device)
    dispatch.check_operand(OP, operand, bank)
    positives, positive_weight = checked_positives(positives, positive_weight, row_weight, bank)
    with torch.no_grad():
        torch.ops.caco_fast.bank_step_(
            bank,
            velocity,
            queries.detach(),
            lse.detach(),
            float(temperature),
            on_device(lr, bank),
            float(momentum),
            float(weight_decay),
            row_weight.detach(),
            positives,
            positive_weight,
            norm,
            skip,
            operand,
            backend,
        )


def check_like_bank(velocity: Tensor, bank: Tensor) -> None:
    dispatch.check_like(OP, "velocity", velocity, tuple(bank.shape), "[K, C] as the bank", bank)
    if velocity.dtype != bank.dtype:
        raise TypeError(f"{OP}: velocity: found {velocity.dtype}, expected {bank.dtype} as the bank")


def check_settings(lr: Rate, momentum: float, weight_decay: float, norm: str, device: torch.device) -> None:
    if isinstance(lr, Tensor):
        check_rate(OP, "lr", lr, device)
    elif not math.isfinite(lr) or lr < 0:
        raise ValueError(f"{OP}: lr: found {lr}, expected a finite number, 0 or more")
    if not 0 <= momentum < 1:
        raise ValueError(f"{OP}: momentum: found {momentum}, expected a number in [0, 1)")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"{OP}: weight_decay: found {weight_decay}, expected a finite number, 0 or more")
    if norm not in ("implicit", "project"):
        raise ValueError(f"{OP}: norm: found {norm!r}, expected 'implicit' or 'project'")


def checked_positives(
    positives: Tensor | None, positive_weight: Tensor | None, row_weight: Tensor, bank: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Positives [R, M] with their weights [R, M], which are 1 / M by default; (None, None) for M = 0."""
    if positives is None:
        if positive_weight is not None and positive_weight.numel() > 0:
            found = dispatch.shape(positive_weight)
            raise ValueError(f"{OP}: positive_weight: found {found} without positives, expected both")
        return None, None
    dispatch.check_tensor(OP, "positives", positives)
    rows = row_weight.shape[0]
    if positives.dim() != 2 or positives.shape[0] != rows:
        found = dispatch.shape(positives)
        raise ValueError(f"{OP}: positives: found shape {found}, expected [R, M] with R = {rows}")
    if positives.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{OP}: positives: found {positives.dtype}, expected torch.int64")
    dispatch.check_device(OP, "positives", positives, bank)
    if positives.shape[1] == 0:
        return None, None
    if positive_weight is None:
        return positives, row_weight.new_full(positives.shape, 1 / positives.shape[1])
    dispatch.check_like(OP, "positive_weight", positive_weight, tuple(positives.shape), "[R, M]", bank)
    return positives, positive_weight


def check_positive_range(positives: Tensor, bank_rows: int) -> None:
    """Refuse an index out of range, on the CPU only: reading values of an accelerator would make the host wait."""
    if positives.device.type != "cpu" or positives.numel() == 0:
        return
    low, high = (int(bound) for bound in positives.aminmax())
    if low < 0 or high >= bank_rows:
        found = low if low < 0 else high
        raise IndexError(f"{OP}: positives: found {found}, expected a bank row in [0, {bank_rows - 1}]")


@f32_products()
def step_reference_(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    lse: Tensor,
    temperature: float,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    row_weight: Tensor,
    positives: Tensor | None,
    positive_weight: Tensor | None,
    norm: str,
) -> None:
    """The formula, dense."""
    queries = queries.to(bank.dtype)
    unit, inverse_norm = unit_rows(bank)  # [K, C], [K, 1]
    similarity = queries @ unit.T  # [R, K]
    p = torch.exp(similarity / temperature - lse.to(bank.dtype).unsqueeze(1))  # [R, K]
    chosen = torch.zeros_like(p)  # [R, K]: sum_m o_im [j = pi_im]
    if positives is not None and positive_weight is not None:
        chosen.scatter_add_(1, positives.long(), positive_weight.to(bank.dtype))
    pull = row_weight.to(bank.dtype).unsqueeze(1) * (p + chosen * (1 - 2 * p))  # [R, K]: a_i c_ij
    tangent = pull.T @ queries - (pull * similarity).sum(dim=0).unsqueeze(1) * unit  # [K, C]
    gradient = -tangent * inverse_norm / temperature
    velocity.mul_(momentum).add_(gradient)
    if weight_decay:
        velocity.add_(bank, alpha=weight_decay)
    bank.sub_(lr * velocity)
    if norm == "project":
        bank.copy_(unit_rows(bank)[0])


@f32_products()
def step_tiled_(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    lse: Tensor,
    temperature: float,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    row_weight: Tensor,
    positives: Tensor | None,
    positive_weight: Tensor | None,
    norm: str,
) -> None:
    """Plain torch over tiles of bank rows; neither [R, K] nor a [K, C] gradient is ever held.

    c_ij differs from p_ij for the R M pairs of a row and its positives only, so these are added to the velocity first.
    """
    lse, row_weight = lse.to(bank.dtype), row_weight.to(bank.dtype)
    velocity.mul_(momentum)
    if positives is not None and positive_weight is not None:
        add_positives_(bank, velocity, queries, lse, temperature, row_weight, positives.long(), positive_weight)

    dtype = operand_dtype(queries)
    tiles = make_tiles(queries.shape[0], bank)
    queries = queries.to(dtype).contiguous()
    # Weights relative to the largest are exact in low precision when they are all equal.
    largest_weight = row_weight.abs().amax() if row_weight.numel() else row_weight.new_ones(())
    largest_weight = largest_weight.clamp_min(torch.finfo(bank.dtype).tiny)
    weighted = queries * (row_weight / largest_weight).to(dtype).unsqueeze(1)  # [R, C]
    shift = lse * -LOG2_E  # [R]
    scale = LOG2_E / temperature

    for bank_span in tiles.bank_rows:
        rows, speed = bank[bank_span], velocity[bank_span]  # [k, C] views
        unit, inverse_norm = unit_rows(rows)  # [k, C], [k, 1]
        operand = unit.to(dtype)
        pulled = torch.zeros_like(unit)  # [k, C]: G_j
        for span in tiles.rows:
            similarity = product(operand, queries[span].T)  # [k, r]
            p = tiles.scratch_for(similarity, in_place=True)
            torch.add(shift[span], similarity, alpha=scale, out=p).exp2_()
            pulled += product(p.to(dtype), weighted[span])
        along = torch.linalg.vecdot(pulled, unit).unsqueeze(1)  # [k, 1]
        pulled.addcmul_(unit, along, value=-1)
        speed.addcmul_(pulled, inverse_norm * largest_weight, value=-1 / temperature)
        if weight_decay:
            speed.add_(rows, alpha=weight_decay)
        rows.addcmul_(speed, lr, value=-1)
        if norm == "project":
            rows.copy_(unit_rows(rows)[0])


def add_positives_(
    bank: Tensor,  # [K, C]
    velocity: Tensor,  # [K, C]
    queries: Tensor,  # [R, C]
    lse: Tensor,  # [R]
    temperature: float,
    row_weight: Tensor,  # [R]
    positives: Tensor,  # [R, M]
    positive_weight: Tensor,  # [R, M]
) -> None:
    """Add the gradient of the positives' part of c, sum_m o_im [j = pi_im] (1 - 2 p_ij), to the velocity."""
    many = positives.shape[1]
    index = positives.flatten()  # [R M]
    unit, inverse_norm = unit_rows(bank[index])  # [R M, C], [R M, 1]
    queries = queries.to(bank.dtype).repeat_interleave(many, dim=0)  # [R M, C]
    similarity = torch.linalg.vecdot(queries, unit)  # [R M]
    p = torch.exp(similarity / temperature - lse.repeat_interleave(many))  # [R M]
    pull = (row_weight.unsqueeze(1) * positive_weight.to(bank.dtype)).flatten() * (1 - 2 * p)  # [R M]
    tangent = queries.addcmul(unit, similarity.unsqueeze(1), value=-1)  # [R M, C]
    gradient = tangent.mul_(inverse_norm * (pull / -temperature).unsqueeze(1))
    if velocity.device.type == "cpu":
        velocity.index_add_(0, index, gradient)
    else:
        # index_add_ uses atomics on a GPU; this sorts, so two runs give the same bits.
        velocity.index_put_((index,), gradient, accumulate=True)


def step_cuda_(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    lse: Tensor,
    temperature: float,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    row_weight: Tensor,
    positives: Tensor | None,
    positive_weight: Tensor | None,
    norm: str,
    skip: Tensor | None,
    operand: Tensor | None,
) -> None:
    """`step_tiled_` on the compiled kernels, with `skip`; positives outside of the bank are ignored."""
    kernels: Any = dispatch.cuda_backend()
    kernels.check_bank(OP, bank)
    (rows, channels), bank_rows = queries.shape, bank.shape[0]
    many = 0 if positives is None or rows == 0 else positives.shape[1]
    if many > kernels._C.max_positives:
        raise ValueError(f"{OP}: positives: found M = {many}, expected at most {kernels._C.max_positives}")
    if rows * many >= 2**30:
        raise ValueError(f"{OP}: positives: found R M = {rows * many}, expected below 2^30")
    target = kernels.target_for(bank.device)
    dtype = kernels.operand_dtype(queries, target) if operand is None else operand.dtype
    if operand is not None:
        kernels.check_layout(operand, bank)
    exact_bank, exact_velocity = bank.contiguous(), velocity.contiguous()
    # Rows in the dtype of the products are exact there.
    products = kernels.row_operand(queries, dtype, target)
    chosen = weights = None
    if many > 0 and positives is not None and positive_weight is not None:
        chosen, weights = positives.long().contiguous(), positive_weight.float().contiguous()
    kernels.launch(
        "bank_step",
        target,
        bank=exact_bank,
        velocity=exact_velocity,
        bank_operand=operand,
        queries=products,
        exact_queries=None if queries.dtype == dtype else queries.float().contiguous(),
        lse=lse.float().contiguous(),
        row_weight=row_weight.float().contiguous(),
        positive=chosen,
        positive_weight=weights,
        workspace=kernels.workspace(kernels._C.bank_step_workspace(rows), bank),
        rows=rows,
        bank_rows=bank_rows,
        channels=channels,
        positives=many,
        type=dtype,
        temperature=temperature,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        project=norm == "project",
        skip=skip,
    )
    if exact_bank is not bank:
        bank.copy_(exact_bank)
    if exact_velocity is not velocity:
        velocity.copy_(exact_velocity)


@torch.library.custom_op("caco_fast::bank_step_", mutates_args=("bank", "velocity", "operand"))
def _bank_step_(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    lse: Tensor,
    temperature: float,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    row_weight: Tensor,
    positives: Tensor | None,
    positive_weight: Tensor | None,
    norm: str,
    skip: Tensor | None,
    operand: Tensor | None,
    backend: str,
) -> None:
    if positives is not None:
        check_positive_range(positives, bank.shape[0])
    chosen = dispatch.resolve(OP, backend, bank.device, bank.dtype)
    settings = (queries, lse, temperature, lr, momentum, weight_decay, row_weight, positives, positive_weight, norm)
    # Autocast would turn the f32 products into bf16 ones.
    with torch.autocast(bank.device.type, enabled=False):
        if chosen == "cuda":
            step_cuda_(bank, velocity, *settings, skip, operand)
            return
        # Whether to skip is decided on the device: the host does not wait for it.
        before = (bank, velocity) if skip is None else (bank.clone(), velocity.clone())
        step = step_reference_ if chosen == "reference" else step_tiled_
        step(bank, velocity, *settings)
        if skip is not None:
            bank.copy_(torch.where(skip != 0, before[0], bank))
            velocity.copy_(torch.where(skip != 0, before[1], velocity))
        if operand is not None:
            operand.zero_()[:, : bank.shape[1]].copy_(unit_rows(bank)[0])


_bank_step_.register_fake(lambda *arguments: None)
