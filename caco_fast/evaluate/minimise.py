"""L-BFGS for many independent convex problems at once, until the gradient of each one has vanished.

Legend: B problems, A of them still running, n variables of a problem.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Steps whose differences stand for the curvature: as many as fit into these bytes, between these numbers.
HISTORY, HISTORY_BYTES = (10, 50), 2**29
# A step is long enough if the slope has fallen to this share, and low enough by one of two rules (Hager and Zhang,
# SIAM J. Optim. 16, 2005): the loss fell by a share of what the slope promised; or, where the loss can't be told from
# the one before for rounding, the slope has not turned to more than this share of it upwards.
LONG, FALLS, TURNS = 0.9, 1e-4, 0.8
TRIALS = 25

# (points [A, n], their numbers among all problems [A]) -> losses [A] f64, gradients [A, n]
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Minimum(NamedTuple):
    """Where `minimise` ended."""

    point: Tensor  # [B, n]
    loss: Tensor  # [B] f64
    gradient: Tensor  # [B], norm of the gradient as a share of `scale`
    converged: Tensor  # [B], whether that is at most the tolerance
    evaluations: int


class _State:
    """The running problems: where they are, in which direction they go, and the bracket of the step."""

    def __init__(self, numbers: Tensor, point: Tensor, loss: Tensor, gradient: Tensor) -> None:
        self.numbers, self.point, self.loss, self.gradient = numbers, point, loss, gradient
        self.direction = -gradient
        self.slope = _dot(gradient, self.direction)
        self.step, self.low = torch.ones_like(loss), torch.zeros_like(loss)
        self.high = torch.full_like(loss, torch.inf)
        self.low_slope, self.high_slope = self.slope.clone(), torch.zeros_like(loss)
        self.trials = torch.zeros_like(numbers)
        self.plain = torch.ones_like(numbers, dtype=torch.bool)  # the direction is that of the gradient
        # [A, n] each, the newest last, with 1 / (difference . change); 0: that problem made no step then.
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(self, mask: Tensor) -> None:
        """Drop the problems that are not in the mask."""
        if mask.all():
            return
        self.history = [(s[mask], y[mask], r[mask]) for s, y, r in self.history]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[mask])

    def turn(self, moved: Tensor, forget: Tensor) -> None:
        """Choose a new direction for problems that moved; those to forget take that of the gradient."""
        self.history = [(s, y, torch.where(forget, 0.0, r)) for s, y, r in self.history]
        fresh = moved | forget
        direction = self._newton()
        slope = _dot(self.gradient, direction)
        # The direction can only point upwards through rounding.
        self.plain = torch.where(fresh, forget | ~(slope < 0), self.plain)
        direction = torch.where((forget | ~(slope < 0)).unsqueeze(1), -self.gradient, direction)
        self.direction = torch.where(fresh.unsqueeze(1), direction, self.direction)
        self.slope = torch.where(fresh, _dot(self.gradient, self.direction), self.slope)
        self.step = torch.where(fresh, 1.0, self.step)
        self.low = torch.where(fresh, 0.0, self.low)
        self.high = torch.where(fresh, torch.inf, self.high)
        self.low_slope = torch.where(fresh, self.slope, self.low_slope)
        self.trials = torch.where(fresh, 0, self.trials)

    def _newton(self) -> Tensor:
        """- H g by the two loops of L-BFGS."""
        q, shares = -self.gradient, []
        for s, y, rho in reversed(self.history):
            share = rho * _dot(s, q)
            q = q - share.to(q.dtype).unsqueeze(1) * y
            shares.append(share)
        scale = torch.ones_like(self.loss)
        for _, y, rho in self.history:
            scale = torch.where(rho > 0, 1 / (rho * _dot(y, y)).clamp_min(1e-300), scale)
        q = q * scale.to(q.dtype).unsqueeze(1)
        for (s, y, rho), share in zip(self.history, reversed(shares)):
            q = q + (share - rho * _dot(y, q)).to(q.dtype).unsqueeze(1) * s
        return q


@torch.no_grad()
def minimise(
    evaluate: Evaluate, start: Tensor, scale: Tensor, *, tolerance: float, max_evaluations: int = 2000
) -> Minimum:
    """The minima of B smooth convex functions from the points `start` [B, n].

    Every problem ends by itself, when the norm of its gradient is at most `tolerance` times its `scale` [B]. It also
    ends, with `converged` False, when rounding leaves it no step downwards, or at `max_evaluations`. Variables should
    be scaled so that the second derivatives are near 1, because the first step is as long as the gradient.
    """
    numbers = torch.arange(len(start), device=start.device)
    loss, gradient = evaluate(start, numbers)
    point, final, left = start.clone(), loss.clone(), gradient.double().norm(dim=1)
    state, evaluations = _State(numbers, start.clone(), loss, gradient), 1
    threshold = tolerance * scale.double()
    state.keep(left > threshold)
    bytes_of_step = 2 * start.numel() * start.dtype.itemsize
    history = max(HISTORY[0], min(HISTORY[1], HISTORY_BYTES // max(1, bytes_of_step)))
    epsilon = 10 * torch.finfo(start.dtype).eps
    while len(state.numbers) and evaluations < max_evaluations:
        trial = state.point + state.step.to(start.dtype).unsqueeze(1) * state.direction
        loss, gradient = evaluate(trial, state.numbers)
        evaluations += 1
        slope = _dot(gradient, state.direction)
        finite = loss.isfinite() & slope.isfinite()
        falls = loss <= state.loss + FALLS * state.step * state.slope
        level = (loss <= state.loss + epsilon * state.loss.abs()) & (slope <= -TURNS * state.slope)
        low_enough = finite & (falls | level)
        long_enough = slope >= LONG * state.slope
        moved = low_enough & long_enough
        short = low_enough & ~long_enough
        _narrow(state, short, ~low_enough, torch.where(finite, slope, torch.inf))
        if moved.any():
            s = torch.where(moved.unsqueeze(1), trial - state.point, 0.0)
            y = torch.where(moved.unsqueeze(1), gradient - state.gradient, 0.0)
            product = _dot(s, y)
            rho = torch.where(product > 1e-12 * _dot(y, y), 1 / product.clamp_min(1e-300), 0.0)
            state.history = [*state.history[1 - history :], (s, y, rho)]
            state.point = torch.where(moved.unsqueeze(1), trial, state.point)
            state.gradient = torch.where(moved.unsqueeze(1), gradient, state.gradient)
            state.loss = torch.where(moved, loss, state.loss)
            point[state.numbers], final[state.numbers] = state.point, state.loss
            left[state.numbers] = state.gradient.double().norm(dim=1)
        stuck = ~moved & (state.trials >= TRIALS)
        running = (left[state.numbers] > threshold[state.numbers]) & ~(stuck & state.plain)
        if moved.any() or stuck.any():
            state.turn(moved, stuck & ~state.plain)
        state.keep(running)
    share = left / scale.double().clamp_min(1e-300)
    return Minimum(point, final, share, left <= threshold, evaluations)


def _narrow(state: _State, short: Tensor, high: Tensor, slope: Tensor) -> None:
    """The next step of the problems whose step was too short or too long: where the slope is expected to vanish."""
    state.low_slope = torch.where(short, slope, state.low_slope)
    state.low = torch.where(short, state.step, state.low)
    state.high_slope = torch.where(high, slope, state.high_slope)
    state.high = torch.where(high, state.step, state.high)
    width = state.high - state.low
    secant = -state.low_slope / (state.high_slope - state.low_slope)
    # A slope that still falls at the upper end, or an infinite one, says nothing of where it vanishes.
    secant = torch.where((state.high_slope > 0) & state.high_slope.isfinite(), secant, 0.5).clamp(0.1, 0.9)
    inside = state.low + secant * width
    state.step = torch.where(short | high, torch.where(state.high.isinf(), 4 * state.low, inside), state.step)
    state.trials = state.trials + (short | high)


def _dot(a: Tensor, b: Tensor) -> Tensor:  # [A, n], [A, n] -> [A] f64
    return torch.linalg.vecdot(a, b).double() if a.dtype == torch.float64 else (a.double() * b).sum(1)
