"""InfoNCE of a query with its own key and the rows of a bank or queue: the loss of MoCo and of CaCo's initialisation.

Legend: R rows, C channels; n_j are the rows of the bank or queue.
"""

import torch


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
