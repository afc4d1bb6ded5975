"""bank_step_: one momentum step of a learnable bank, in place.

With s_ij = q_i . u_j, u_j = w_j / |w_j|, p_ij = exp(s_ij / t - lse_i), row weights a_i, positives pi_im weighted o_im:

    c_ij = p_ij + sum_m o_im [j = pi_im] (1 - 2 p_ij)
    g_j  = - 1 / (t |w_j|) * sum_i a_i c_ij (q_i - s_ij u_j)
    V <- mu V + g ;  W <- W - eta V ;  and with norm "project" W_j <- W_j / |W_j|

All of the right-hand side is from before the step. As s_ij = q_i . u_j, the tangent needs one sum only:
sum_i a_i c_ij (q_i - s_ij u_j) = G_j - (G_j . u_j) u_j with G_j = sum_i a_i c_ij q_i.

Legend: R query rows, K bank rows, C channels, M positives per row; a tile is k bank rows by r query rows.
"""

import torch
from torch import Tensor

from caco_fast.ops import backends, checks
from caco_fast.ops.rates import Rate, check_rate
from caco_fast.ops.tiling import LOG2_E, make_tiles, operand_dtype, product, unit_rows

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
    skip: Tensor | None = None,  # []
    backend: str = "auto",
) -> None:
    """Move the bank rows and their velocity; positives descend the contrastive loss and negatives ascend it.

    lse: `bank_attend` of the same queries and bank at `temperature`, the bank temperature t_m.
    lr: a tensor on the device, [], is not looked at.
    row_weight: 1 / B for each of the rows of a batch of B images. positive_weight: sums to 1 over M; None means 1 / M.
    positives: None or M = 0 for AdCo (negatives only), M = 1 for CaCo. An index out of range is an IndexError on the
        CPU; on an accelerator it is not looked at, the device's own check reports it.
    norm: "implicit" keeps the rows' lengths as they come, "project" rescales every row to unit length after the step.
    skip: an f32 flag on the device, such as GradScaler's found_inf; where it is not 0 bank and velocity stay as they
        are.

    Raises ValueError, TypeError or IndexError for a bad argument, RuntimeError if the named backend is not there.
    Source: CaCo, eq. 7-10 and section IV-C; AdCo for M = 0.
    """
    checks.check_backend(OP, backend)
    checks.check_rows_and_bank(OP, "queries", queries, bank)
    rows = queries.shape[0]
    checks.check_like(OP, "velocity", velocity, tuple(bank.shape), "[K, C] as the bank", bank)
    if velocity.dtype != bank.dtype:
        raise TypeError(f"{OP}: velocity: found {velocity.dtype}, wanted {bank.dtype} as the bank")
    checks.check_like(OP, "lse", lse, (rows,), "[R]", bank)
    checks.check_like(OP, "row_weight", row_weight, (rows,), "[R]", bank)
    checks.check_temperature(OP, temperature)
    checks.check_step_settings(OP, 0.0 if isinstance(lr, Tensor) else lr, momentum, norm)
    if isinstance(lr, Tensor):
        check_rate(OP, "lr", lr, bank.device)
    checks.check_flag(OP, "skip", skip, bank.device)
    if positives is not None:
        checks.check_positives(OP, positives, rows, bank)
        if positives.shape[1] == 0:
            positives = positive_weight = None
        elif positive_weight is None:
            positive_weight = row_weight.new_full(positives.shape, 1 / positives.shape[1])
        else:
            checks.check_like(OP, "positive_weight", positive_weight, tuple(positives.shape), "[R, M]", bank)
    elif positive_weight is not None and positive_weight.numel() > 0:
        raise ValueError(f"{OP}: positive_weight: found {checks.shape(positive_weight)} without positives, wanted both")
    else:
        positive_weight = None
    with torch.no_grad():
        torch.ops.caco_fast.bank_step_(
            bank,
            velocity,
            queries.detach(),
            lse.detach(),
            float(temperature),
            0.0 if isinstance(lr, Tensor) else float(lr),
            lr if isinstance(lr, Tensor) else None,
            float(momentum),
            row_weight.detach(),
            positives,
            positive_weight,
            norm,
            skip,
            backend,
        )


def step_reference_(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    lse: Tensor,
    temperature: float,
    lr: Rate,
    momentum: float,
    row_weight: Tensor,
    positives: Tensor | None,
    positive_weight: Tensor | None,
    norm: str,
) -> None:
    """As the formula, dense."""
    queries = queries.to(bank.dtype)
    unit, inverse_norm = unit_rows(bank)  # [K, C], [K, 1]
    similarity = queries @ unit.T  # [R, K]
    p = torch.exp(similarity / temperature - lse.to(bank.dtype).unsqueeze(1))  # [R, K]
    chosen = torch.zeros_like(p)  # [R, K]: sum_m o_im [j = pi_im]
    if positives is not None:
        chosen.scatter_add_(1, positives.long(), positive_weight.to(bank.dtype))
    pull = row_weight.to(bank.dtype).unsqueeze(1) * (p + chosen * (1 - 2 * p))  # [R, K]: a_i c_ij
    tangent = pull.T @ queries - (pull * similarity).sum(dim=0).unsqueeze(1) * unit  # [K, C]
    gradient = -tangent * inverse_norm / temperature
    velocity.mul_(momentum).add_(gradient)
    bank.sub_(lr * velocity)
    if norm == "project":
        bank.copy_(unit_rows(bank)[0])


def step_tiled_(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    lse: Tensor,
    temperature: float,
    lr: Rate,
    momentum: float,
    row_weight: Tensor,
    positives: Tensor | None,
    positive_weight: Tensor | None,
    norm: str,
) -> None:
    """Plain torch over tiles of bank rows; neither [R, K] nor a [K, C] gradient is ever held.

    c_ij differs from p_ij for the R M pairs of a row and its positives only, so these are added to the velocity apart.
    """
    lse, row_weight = lse.to(bank.dtype), row_weight.to(bank.dtype)
    velocity.mul_(momentum)
    if positives is not None:
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
        if isinstance(lr, Tensor):
            rows.addcmul_(speed, lr.to(rows.dtype), value=-1)
        else:
            rows.sub_(speed, alpha=lr)
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
    """Add to the velocity what the positives' part of c, sum_m o_im [j = pi_im] (1 - 2 p_ij), gives."""
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


@torch.library.custom_op("caco_fast::bank_step_", mutates_args=("bank", "velocity"))
def _bank_step_(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    lse: Tensor,
    temperature: float,
    lr: float,
    device_lr: Tensor | None,
    momentum: float,
    row_weight: Tensor,
    positives: Tensor | None,
    positive_weight: Tensor | None,
    norm: str,
    skip: Tensor | None,
    backend: str,
) -> None:
    # A rate on the device stands in place of the float.
    rate = lr if device_lr is None else device_lr
    if positives is not None:
        checks.check_positive_range(OP, positives, bank.shape[0])
    chosen = backends.resolve(OP, backend, bank.device, bank.dtype)
    settings = (queries, lse, temperature, rate, momentum, row_weight, positives, positive_weight, norm)
    # Autocast would turn the f32 products into bf16 ones.
    with torch.autocast(bank.device.type, enabled=False):
        if chosen == "cuda":
            backends.cuda_backend().step_(bank, velocity, *settings, skip)
            return
        # Whether to skip is decided on the device, where the host does not wait for it.
        kept = None if skip is None else (bank.clone(), velocity.clone())
        step = step_reference_ if chosen == "reference" else step_tiled_
        step(bank, velocity, *settings)
        for changed, before in zip((bank, velocity), kept or ()):
            changed.copy_(torch.where(skip != 0, before, changed))


_bank_step_.register_fake(lambda *arguments: None)
