"""The accuracy of a linear classifier on frozen features: multinomial logistic regression, solved by L-BFGS.

Legend: N training rows, M test rows, D feature size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.ops.tiling import f32_products

# Weights of |W|^2 / 2 to try, from strong to weak. Each fit starts from the solution of the one before.
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
HELD_OUT = 0.1


@f32_products()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    l2: float | None = None,
    max_iter: int = 100,
) -> float:
    """Per cent of test rows [M, D] that the classifier fitted to the training rows [N, D] labels correctly.

    Features are standardised by the training rows' mean and deviation. The loss is mean cross-entropy + l2 |W|^2 / 2
    (no penalty on the bias), minimised by full-batch L-BFGS with strong Wolfe steps, which is deterministic. With `l2`
    None it takes the best of `PENALTIES` on a tenth of the training rows, and fits again to all of them. The test rows
    play no part in the choice. Each process expects all rows.
    """
    labels, answers = train_labels.long(), test_labels.long().to(train_features.device)
    if len(labels) == 0 or len(answers) == 0:
        raise UserError(
            f"linear probe: found {len(labels)} training and {len(answers)} test images, expected at least 1 of each"
        )
    train, test = _standardise(train_features.float(), test_features.float())
    if not (train.isfinite().all() and test.isfinite().all()):
        raise UserError("linear probe: some features are NaN or infinite, the encoder has diverged")
    if l2 is None:
        l2 = _choose_penalty(train, labels, classes, max_iter) if len(labels) >= 20 else PENALTIES[0]
    weight = _fit(train, labels, classes, l2, max_iter)
    return _accuracy(weight, test, answers)


def _choose_penalty(features: Tensor, labels: Tensor, classes: int, max_iter: int) -> float:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(features.device)
    held = max(1, int(len(labels) * HELD_OUT))
    out, kept = order[:held], order[held:]
    weight, scores = None, []
    for l2 in PENALTIES:
        weight = _fit(features[kept], labels[kept], classes, l2, max_iter, start=weight)
        scores.append(_accuracy(weight, features[out], labels[out]))
    # The first of equal scores has the strongest penalty.
    return PENALTIES[scores.index(max(scores))]


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with zero mean and unit deviation over the training rows, and a column of ones for the bias."""
    deviation, mean = torch.std_mean(train, dim=0, correction=0)
    # A column that is constant up to rounding carries no information; dividing by its deviation would amplify noise.
    scale = torch.where(deviation > 1e-6 * (1e-6 + mean.abs()), 1 / deviation, 0.0)
    return tuple(F.pad((rows - mean) * scale, (0, 1), value=1.0) for rows in (train, test))  # type: ignore[return-value]


def _fit(
    features: Tensor, labels: Tensor, classes: int, l2: float, max_iter: int, start: Tensor | None = None
) -> Tensor:  # [classes, D + 1]
    zeros = features.new_zeros(classes, features.shape[1])
    weight = (zeros if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_iter,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T, labels) + l2 / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()


def _accuracy(weight: Tensor, features: Tensor, labels: Tensor) -> float:
    return 100.0 * (features @ weight.T).argmax(1).eq(labels).float().mean().item()
