"""InfoNCE of a query with its own key: against the rows of a bank or queue (MoCo, CaCo's initialisation), or the batch.

Legend: R rows on this rank, N ranks, C channels; n_j are the rows of the bank or queue.
"""

import torch
from torch.nn.functional import cross_entropy

from caco_fast.distributed import all_gather_rows_with_gradient, rank
from caco_fast.ops.tiling import f32_products


@f32_products()
def batch_logits(
    queries: torch.Tensor,  # [R, C]
    rows: torch.Tensor,  # [S, C], such as the keys of all ranks
    temperature: float,
) -> torch.Tensor:  # [R, S]
    """q_i . x_l / t for rows of the batch, which are few enough for a dense product. Differentiable in both."""
    return queries @ rows.T / temperature


def own_rows(queries: torch.Tensor) -> torch.Tensor:  # [R, C] -> [R]
    """The place of this rank's rows among those of all ranks, as `all_gather_rows` orders them."""
    count = queries.shape[0]
    return torch.arange(rank() * count, (rank() + 1) * count, device=queries.device)


def without(own: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:  # [R, 1], [R, S] -> [R, S]
    """The logits with -inf for the own column, which a softmax then leaves out."""
    return logits.scatter(1, own, -torch.inf)


def batch_info_nce(
    queries: torch.Tensor,  # [R, C]
    rows: torch.Tensor,  # [R, C], row i is the positive of query i
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean_i [ lse_l(q_i . r_l / t) - q_i . r_i / t ], l over the rows of all ranks, with gradient in both arguments.

    Returns:
        The loss and the mean probability of the positive, both 0-d; the second without gradient.
    """
    logits = batch_logits(queries, all_gather_rows_with_gradient(rows), temperature)
    losses = cross_entropy(logits, own_rows(queries), reduction="none")
    return losses.mean(), (-losses).detach().exp().mean()


def info_nce(
    queries: torch.Tensor,  # [R, C]
    keys: torch.Tensor,  # [R, C]
    lse_rows: torch.Tensor,  # [R], `bank_attend` of the queries over bank or queue at this temperature
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean_i [ lse(q_i . k_i / t  U  {q_i . n_j / t}_j) - q_i . k_i / t ]  (docs/method.md, InfoNCE and MoCo).

    Returns:
        The loss and the mean probability of the key, both 0-d; the second without gradient.
    """
    # In the bank's dtype, even if the queries have a narrower one.
    positive = (queries.to(lse_rows.dtype) * keys.to(lse_rows.dtype)).sum(dim=1) / temperature
    lse = torch.logaddexp(lse_rows, positive)
    return (lse - positive).mean(), (positive - lse).detach().exp().mean()
