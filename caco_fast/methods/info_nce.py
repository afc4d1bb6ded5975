"""InfoNCE of a query against its own key and the rows of a bank or queue: MoCo's loss, and that of CaCo's preparation.

Legend: R rows, K bank rows, C channels.
"""

import torch

from caco_fast.ops import bank_attend


def info_nce(
    queries: torch.Tensor,  # [R, C]
    keys: torch.Tensor,  # [R, C]
    rows: torch.Tensor,  # [K, C]
    temperature: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean_i [ lse(q_i . k_i / t  U  {q_i . n_j / t}_j) - q_i . k_i / t ]  (methods.md, section 3; MoCo, eq. 1).

    Returns:
        The loss and the mean probability of the key, both 0-d; the second without gradient.
    """
    lse_rows, _ = bank_attend(queries, rows, temperature, backend=backend)
    # In the bank's dtype, also where the queries come in a narrower one.
    positive = (queries.to(rows.dtype) * keys.to(rows.dtype)).sum(dim=1) / temperature
    lse = torch.logaddexp(lse_rows, positive)
    return (lse - positive).mean(), (positive - lse).detach().exp().mean()
