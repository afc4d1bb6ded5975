"""InfoNCE of a query with its own key and the rows of a bank or queue: the loss of MoCo and of CaCo's initialisation.

Legend: R rows on this rank, N ranks, C channels; n_j are the rows of the bank or queue.
"""

import torch

from caco_fast.distributed import rank
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
