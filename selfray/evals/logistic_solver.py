"""Many L2-penalised logistic regressions on the same features, solved together.

L-BFGS in the eigenbasis of the features' Gram matrix. There the Hessian at w = 0 is diagonal and
known for every target and penalty, so its inverse is the first guess of each inverse Hessian, which
saves most of the steps. Two matrix products a step serve all problems; the line search needs none,
because logits are linear along a direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HISTORY = 10  # pairs kept by L-BFGS
_CHECK_EVERY = 4  # steps; a check costs as much as a round of the line search
_ELEMENTS = 4_000_000  # logits in memory at once (rows x problems); bounds every temporary

_Pair = tuple[Tensor, Tensor, Tensor]  # change of w, change of the gradient [B, D+1], 1 / their dot


@dataclass(frozen=True)
class _Problems:
    """B independent problems: features x [N, D+1] with a last column of ones, y and known [N, B],
    ridge [B, D+1], 0 for the intercept."""

    x: Tensor
    y: Tensor
    known: Tensor
    ridge: Tensor

    def keep(self, which: Tensor) -> _Problems:
        return _Problems(self.x, self.y[:, which], self.known[:, which], self.ridge[which])

    def loss(self, w: Tensor, z: Tensor) -> Tensor:
        log_loss = (torch.nn.functional.softplus(z) - self.y * z) * self.known
        return log_loss.sum(dim=0) + 0.5 * (self.ridge * w.square()).sum(dim=1)

    def gradient(self, w: Tensor, residual: Tensor) -> Tensor:
        return residual.T @ self.x + self.ridge * w


def solve_logistic(
    features: Tensor,
    labels: Tensor,
    known: Tensor,
    strengths: Tensor,
    *,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, int]:
    """Minimise, for each target and strength, log-loss + strength / 2 x squared norm of weights.

    Args:
        features: [N, D] float64, standardised.
        labels: [N, T] float64, 1 or 0, anything finite where not known.
        known: bool [N, T]; each target needs a known 1 and a known 0.
        strengths: [S] float64, > 0.
        tolerance: Stop when what is left to gain is below this fraction of the loss; what is left
            is bounded from above by the gradient and the penalty's curvature.
        max_steps: Stop then in any case.

    Returns:
        Weights [S, T, D], biases [S, T], and the steps of the slowest problem.

    Reference:
        Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 7.4 (two-loop recursion).
    """
    mean = features.mean(dim=0)
    # Neither centring nor rotation changes the optimum: the intercept is free, and the norm of the
    # weights is the same in any rotated basis.
    centred = features - mean
    eigenvalues, basis = torch.linalg.eigh(centred.T @ centred)
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    x = torch.cat([centred @ basis, ones], dim=1)
    curvature = torch.cat([eigenvalues.clamp(min=0) / len(x), torch.ones(1, dtype=torch.float64)])
    s, t = torch.cartesian_prod(torch.arange(len(strengths)), torch.arange(labels.shape[1])).unbind(
        dim=1
    )
    parts, steps = [], 0
    block = max(1, _ELEMENTS // len(x))
    for s_part, t_part in zip(s.split(block), t.split(block), strict=True):
        ridge = strengths[s_part, None].repeat(1, x.shape[1])
        ridge[:, -1] = 0
        problems = _Problems(x, labels[:, t_part], known[:, t_part].double(), ridge)
        solved, used = _lbfgs(problems, curvature, tolerance, max_steps)
        parts.append(solved)
        steps = max(steps, used)
    solution = torch.cat(parts).reshape(len(strengths), labels.shape[1], -1)
    weights = solution[..., :-1] @ basis.T
    return weights, solution[..., -1] - weights @ mean, steps


def _lbfgs(
    problems: _Problems, curvature: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, int]:
    """Coefficients [B, D+1], intercept last, and steps; curvature [D+1] of the loss per row."""
    w, inverse = _start(problems, curvature)
    z = w[:, -1].expand(problems.y.shape)
    residual = (torch.sigmoid(z) - problems.y) * problems.known
    gradient = problems.gradient(w, residual)
    history: list[_Pair] = []
    result, active = w.clone(), torch.arange(len(w))
    step = 0
    for step in range(max_steps):
        direction = -_two_loop(gradient, history, inverse)
        if step % _CHECK_EVERY == 0:
            result[active] = w
            unsolved = _left_to_gain(problems, gradient, direction) > tolerance * problems.loss(
                w, z
            )
            if not bool(unsolved.any()):
                return result, step
            if float(unsolved.double().mean()) < 0.8:  # else dropping costs more than it saves
                problems, active, z = problems.keep(unsolved), active[unsolved], z[:, unsolved]
                w, gradient, direction = w[unsolved], gradient[unsolved], direction[unsolved]
                inverse = inverse[unsolved]
                history = [(a[unsolved], b[unsolved], c[unsolved]) for a, b, c in history]
        moved = problems.x @ direction.T
        slope = (gradient * direction).sum(dim=1)
        length, residual = _line_search(problems, w, z, direction, moved, slope)
        change = length[:, None] * direction
        w, z = w + change, z + length * moved
        previous, gradient = gradient, problems.gradient(w, residual)
        history = [*history[1 - _HISTORY :], _pair(change, gradient - previous)]
    result[active] = w
    return result, step + 1


def _start(problems: _Problems, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Weights 0 with the intercept at the base rate, and the inverse Hessian's diagonal there.

    The Hessian is exact where no label is null, and scaled to the labelled rows otherwise.
    """
    count = problems.known.sum(dim=0)
    rate = (problems.y * problems.known).sum(dim=0) / count
    w = torch.zeros_like(problems.ridge)
    w[:, -1] = torch.logit(rate)
    return w, 1 / ((rate * (1 - rate) * count)[:, None] * curvature + problems.ridge)


def _left_to_gain(problems: _Problems, gradient: Tensor, direction: Tensor) -> Tensor:
    """How far each loss is above its optimum at most, [B].

    The penalty bends the loss by at least its strength, which bounds the weights' share; the
    intercept, which is not penalised, is covered by the decrease that L-BFGS itself foresees.
    """
    weights = gradient[:, :-1].square().sum(dim=1) / (2 * problems.ridge[:, 0])
    return weights - (gradient * direction).sum(dim=1) / 2


def _two_loop(gradient: Tensor, history: list[_Pair], inverse: Tensor) -> Tensor:
    """The inverse Hessian's estimate times the gradient, [B, D+1]."""
    q = gradient.clone()
    shares = []
    for change, difference, rho in reversed(history):
        share = rho * (change * q).sum(dim=1)
        q -= share[:, None] * difference
        shares.append(share)
    q *= inverse
    if history:
        # Scale the first guess to the curvature met last.
        _, difference, rho = history[-1]
        met = rho * (difference * inverse * difference).sum(dim=1)
        q *= torch.where(met > 0, 1 / met.clamp(min=1e-300), torch.ones_like(met))[:, None]
    for (change, difference, rho), share in zip(history, reversed(shares), strict=True):
        back = rho * (difference * q).sum(dim=1)
        q += (share - back)[:, None] * change
    return q


def _pair(change: Tensor, difference: Tensor) -> _Pair:
    curvature = (change * difference).sum(dim=1)
    # A problem that stands still has no curvature; its pair gets weight 0 instead of 1/0.
    rho = torch.where(curvature > 1e-200, 1 / curvature, torch.zeros_like(curvature))
    return change, difference, rho


def _line_search(
    problems: _Problems, w: Tensor, z: Tensor, direction: Tensor, moved: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Go along `direction` until the slope has shrunk to a third, by safeguarded Newton steps.

    The loss is convex, so a small slope is a low point. `moved` [N, B] is the change of the logits
    z along the whole direction, `slope` [B] the slope at its beginning.

    Returns the lengths [B] and the residuals [N, B] there.
    """
    linear = (problems.ridge * w * direction).sum(dim=1)
    square = (problems.ridge * direction.square()).sum(dim=1)
    length = torch.ones_like(slope)
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    for _ in range(8):
        p = torch.sigmoid(z + length * moved)
        residual = (p - problems.y) * problems.known
        here = (residual * moved).sum(dim=0) + linear + length * square
        good = here.abs() <= 0.3 * slope.abs()
        if bool(good.all()):
            return length, residual
        low, high = torch.where(here < 0, length, low), torch.where(here > 0, length, high)
        bend = (p * (1 - p) * problems.known * moved.square()).sum(dim=0) + square
        newton = length - here / bend.clamp(min=1e-300)
        middle = torch.where(high.isinf(), 4 * length, (low + high) / 2)
        inside = (newton > low) & (newton < high) & (newton < 10 * length)
        length = torch.where(good, length, torch.where(inside, newton, middle))
    return length, (torch.sigmoid(z + length * moved) - problems.y) * problems.known
