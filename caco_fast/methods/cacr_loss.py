"""The attraction and the repulsion of CACR, as functions of unit rows (docs/method.md, CACR).

All distances are squared ones between unit vectors, d(x, y) = |x - y|^2 = 2 - 2 x.y. The second form has the same
gradient on the tangent of the sphere, and x.y needs no [R, S, C] in memory.

Legend: R rows on this rank, S rows of the batch that they are compared with, M positives, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from caco_fast.methods.info_nce import batch_logits, own_rows, without


def attraction(
    anchors: Tensor,  # [R, C]
    positives: Sequence[Tensor],  # M of [R, C]
    t_pos: float,
    constant: bool,
) -> Tensor:  # []
    """mean_i sum_m wp_im d_im with wp = softmax_m(t_pos d_im). constant: no gradient flows through wp."""
    distance = 2 - 2 * (anchors.unsqueeze(1) * torch.stack(list(positives), dim=1)).sum(dim=2)  # [R, M]
    weights = torch.softmax(t_pos * distance, dim=1)
    if constant:
        weights = weights.detach()
    return (weights * distance).sum(dim=1).mean()


def repulsion(
    anchors: Tensor,  # [R, C]
    batch: Tensor,  # [S, C]
    t_neg: float,
    tau_plus: float,
) -> Tensor:  # []
    """mean_i (r_i - tau_plus d_ii) / (1 - tau_plus) with r_i = sum_l wn_il d_il, wn = softmax_l(- t_neg d_il), l != i.

    Gradients flow through everything, the weights included, and into both arguments.
    """
    distance = 2 - 2 * batch_logits(anchors, batch, 1.0)  # [R, S]
    own = own_columns(anchors, batch)
    weights = torch.softmax(without(own, -t_neg * distance), dim=1)
    rows = (weights * distance).sum(dim=1)
    return ((rows - tau_plus * distance.gather(1, own).squeeze(1)) / (1 - tau_plus)).mean()


def repulsion_with_queue(
    queries: Tensor,  # [R, C]
    batch: Tensor,  # [S, C], with gradient
    lse_queue: Tensor,  # [R], `bank_attend` of the queries over the queue at t = 1 / (2 t_neg)
    mean_row: Tensor,  # [R, C], of the same
    t_neg: float,
) -> Tensor:  # []
    """mean_i sum_j wn_ij d_ij with one constant softmax wn over the queue and the batch's other rows.

    exp(- t_neg d) is exp(x.y / t) at t = 1 / (2 t_neg) times a constant, and sum_j p_ij d_ij = 2 - 2 q_i . mean_row_i
    for the softmax p over the queue alone. So attention over the queue, times the queue's share of the joint softmax,
    is its part of the repulsion.
    """
    similarity = batch_logits(queries, batch, 1.0)  # [R, S]
    with torch.no_grad():
        logits = without(own_columns(queries, batch), 2 * t_neg * similarity)
        lse = torch.logaddexp(lse_queue, torch.logsumexp(logits, dim=1))  # [R]
        weights, share = (logits - lse.unsqueeze(1)).exp(), (lse_queue - lse).exp()
    of_queue = share.detach() * (2 - 2 * (queries * mean_row.detach()).sum(dim=1))
    return (of_queue + (weights * (2 - 2 * similarity)).sum(dim=1)).mean()


def anchored(
    queries: Sequence[Tensor],  # M of [R, C], the other views of the anchors' images
    keys: Tensor,  # [R, C], the anchors
    batch: Tensor,  # [S, C], keys of the same view, the anchors among them
    temperature: float,
    euclidean: bool,
) -> tuple[Tensor, Tensor]:  # [], []
    """mean_i sum_m p_im cost_im with the constant p = softmax_m(|q_im - k_i|^2 / T), over M queries of anchor i.

    The cost is 2 T times the cross-entropy of q_im . keys / T (RBF). The euclidean cost is 1 - q_im . k_i minus the
    mean of 1 - q_im . k_l over l != i, under the constant weights softmax_l(- (1 - q_im . k_l) / T).

    Returns:
        The loss, and the mean probability of the own key in softmax_l(q_im . k_l / T), without gradient.
    """
    similarity = batch_logits(torch.cat(list(queries)), batch, 1.0)  # [M R, S]
    own = own_columns(keys, batch).repeat(len(queries), 1)
    positive = similarity.gather(1, own).squeeze(1)  # [M R]
    lse = torch.logsumexp(similarity / temperature, dim=1)
    if euclidean:
        weights = torch.softmax(without(own, similarity.detach() / temperature), dim=1)
        cost = (1 - positive) - (weights * (1 - similarity)).sum(dim=1)
    else:
        cost = 2 * temperature * (lse - positive / temperature)
    distance = (2 - 2 * positive.detach()).view(len(queries), -1)  # [M, R]
    share = torch.softmax(distance / temperature, dim=0)
    probability = (positive / temperature - lse).detach().exp().mean()
    return (share * cost.view_as(share)).sum(dim=0).mean(), probability


def own_columns(rows: Tensor, batch: Tensor) -> Tensor:  # [R, C], [S, C] -> [R, 1]
    """The columns of the rows' own images: `batch` is that of this rank, or of all ranks in rank order."""
    return own_rows(rows).remainder(batch.shape[0]).unsqueeze(1)
