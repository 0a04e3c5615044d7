"""Many L2-penalised logistic regressions on the same features, solved together.

L-BFGS in the eigenbasis of the features' Gram matrix. There the Hessian at w = 0 is diagonal and
known for every target and penalty, so its inverse is the first guess of each inverse Hessian, which
saves most of the steps. A few penalties are solved first; the others start from what lies between
those, and need few steps. A step reads the features once, block by block, for all problems
together, with two matrix products: in float32 as far as that goes, in float64 at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from selfray.evals.feature_rows import RowBlocks, placed_blocks

_HISTORY = 20  # pairs kept by L-BFGS
_FIRST_STRENGTHS = 6  # solved from nothing; the others start between their neighbours
_PROBLEMS = 1024  # at a time; with BLOCK_ROWS it bounds the logits in memory, 16 MiB of float64
_DROP = 0.1  # share of solved problems from which dropping them costs less than it saves
_SHRINK = 0.25  # of the trial length, after a trial that went too far

_Pair = tuple[Tensor, Tensor, Tensor]  # change of w, change of the gradient [B, R+1], 1 / their dot


@dataclass(frozen=True)
class _Data:
    """What all problems share: rows [N, D], eigenbasis [D, R] of their Gram matrix, and signs
    int8 [T, N], 1 for a positive label, -1 for a negative one and 0 for null."""

    rows: RowBlocks
    basis: Tensor
    signs: Tensor


@dataclass
class _Problems:
    """B independent problems and how far they are; coefficients in the eigenbasis, intercept last.

    `index` [B] is a problem's place, `target` [B] its row of the signs, `ridge` [B, R+1] its
    penalty (0 for the intercept), `inverse` [B, R+1] the first guess of the inverse Hessian's
    diagonal, `w` and `gradient` [B, R+1], `loss` and `length` [B], the latter of the next trial.
    """

    index: Tensor
    target: Tensor
    ridge: Tensor
    inverse: Tensor
    w: Tensor
    gradient: Tensor
    loss: Tensor
    length: Tensor
    history: list[_Pair]

    def keep(self, which: Tensor) -> _Problems:
        kept = {field.name: getattr(self, field.name)[which] for field in fields(self)[:-1]}
        history = [(a[which], b[which], c[which]) for a, b, c in self.history]
        return _Problems(**kept, history=history)

    @classmethod
    def join(cls, parts: list[_Problems]) -> _Problems:
        """All parts as one, in the order of `index`; pairs that a part lacks have weight 0."""
        order = torch.cat([part.index for part in parts]).argsort()
        joined = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])[order]
            for field in fields(cls)[:-1]
        }
        history = []
        for age in range(max(len(part.history) for part in parts), 0, -1):
            pairs = [part.history[-age] if age <= len(part.history) else None for part in parts]
            filled = [
                pair or (torch.zeros_like(part.w), torch.zeros_like(part.w), 0 * part.loss)
                for pair, part in zip(pairs, parts, strict=True)
            ]
            history.append(tuple(torch.cat(each)[order] for each in zip(*filled, strict=True)))
        return cls(**joined, history=history)


def solve_logistic(
    rows: RowBlocks,
    labels: Tensor,
    strengths: Tensor,
    *,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, int]:
    """Minimise, for each target and strength, log-loss + strength / 2 x squared norm of weights.

    Args:
        rows: Features [N, D], standardised.
        labels: [N, T]: 1, 0, or NaN where not known; each target needs a 1 and a 0.
        strengths: [S] float64, > 0.
        tolerance: Stop when what is left to gain is below this fraction of the loss; what is left
            is bounded from above by the gradient in float64 and the penalty's curvature.
        max_steps: Stop then in any case. A problem also stops where float64 gives no descent.

    Returns:
        Weights [S, T, D], biases [S, T], and the steps of the slowest problem; a step reads the
        features once.

    Reference:
        Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 7.4 (two-loop recursion).
    """
    known = ~labels.isnan()
    signs = torch.where(known, 2 * labels - 1, 0).to(torch.int8).T.contiguous()
    eigenvalues, basis = _eigenbasis(rows)
    curvature = torch.cat([eigenvalues / rows.shape[0], torch.ones(1, dtype=torch.float64)])
    data = _Data(rows, basis, signs)
    count = known.sum(dim=0).double()
    rate = (signs == 1).sum(dim=1) / count
    distinct, places = np.unique(strengths.numpy(), return_inverse=True)
    found = np.zeros((len(distinct), labels.shape[1], len(curvature)))
    solved: list[int] = []
    steps = 0
    for level in _levels(len(distinct)):
        if solved:
            spline = CubicSpline(np.log(distinct[solved]), found[solved])
            start = torch.as_tensor(spline(np.log(distinct[level])))
        else:
            start = torch.zeros(len(level), *found.shape[1:], dtype=torch.float64)
            start[..., -1] = torch.logit(rate)
        penalty = torch.as_tensor(distinct[level])[:, None, None].repeat(1, *found.shape[1:])
        penalty[..., -1] = 0
        # The Hessian at w = 0: exact where no label is null, scaled to the labelled rows otherwise.
        inverse = 1 / ((rate * (1 - rate) * count)[:, None] * curvature + penalty)
        w, used = _solve(data, start, penalty, inverse, tolerance, max_steps)
        found[level] = w.numpy()
        solved = sorted([*solved, *level])
        steps = max(steps, used)
    solution = torch.as_tensor(found[places])
    return solution[..., :-1] @ basis.T, solution[..., -1], steps


def _levels(count: int) -> list[list[int]]:
    """Positions 0 to count - 1: a few spread ones, then the middles between those, and so on."""
    solved = np.unique(np.linspace(0, count - 1, min(count, _FIRST_STRENGTHS)).round().astype(int))
    levels = [solved.tolist()]
    while len(solved) < count:
        middles = np.setdiff1d((solved[1:] + solved[:-1]) // 2, solved)
        levels.append(middles.tolist())
        solved = np.union1d(solved, middles)
    return levels


def _eigenbasis(rows: RowBlocks) -> tuple[Tensor, Tensor]:
    """Eigenvalues [R] and eigenvectors [D, R] of the features' Gram matrix; R = min(N, D).

    With fewer rows than features the weights of the optimum lie in the span of the rows.
    Otherwise float32 is enough, for the basis only speeds the solver up.
    """
    n, d = rows.shape
    if n < d:
        x = torch.cat(list(rows.blocks(torch.float64)))
        _, singular, basis = torch.linalg.svd(x, full_matrices=False)
        return singular.square(), basis.T
    gram = torch.zeros(d, d, dtype=torch.float64)
    for block in rows.blocks(torch.float32):
        gram += block.T @ block
    eigenvalues, basis = torch.linalg.eigh(gram)
    return eigenvalues.clamp(min=0), basis


def _solve(
    data: _Data,
    start: Tensor,
    penalty: Tensor,
    inverse: Tensor,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, int]:
    """Coefficients [S, T, R+1] from a start and with penalties of that shape; and steps."""
    s, t, width = start.shape
    target = torch.arange(t).repeat(s)
    parts, steps = [], 0

    def left(problems: _Problems, direction: Tensor) -> Tensor:
        return _left_to_gain(problems, direction) <= tolerance * problems.loss

    def left_in_float32(problems: _Problems, direction: Tensor) -> Tensor:
        # Where the penalty is weak the bound is far above what is left, and float32 may never
        # reach it: it has done its share when the foreseen gain is small or trials go astray.
        foreseen = -(problems.gradient * direction).sum(dim=1) / 2
        little = foreseen <= 1e-4 * tolerance * problems.loss
        return left(problems, direction) | little | (problems.length < _SHRINK**3)

    def left_in_float64(problems: _Problems, direction: Tensor) -> Tensor:
        return left(problems, direction) | (problems.length < _SHRINK**20)

    for chunk in torch.arange(s * t).split(_PROBLEMS):
        w, ridge = start.reshape(-1, width)[chunk], penalty.reshape(-1, width)[chunk]
        guess = inverse.reshape(-1, width)[chunk]
        index, length = torch.arange(len(chunk)), torch.ones(len(chunk), dtype=torch.float64)
        problems = _Problems(index, target[chunk], ridge, guess, w, w, length, length, [])
        used = 0
        for dtype, finished in (
            (torch.float32, left_in_float32),
            (torch.float64, left_in_float64),
        ):
            problems, more = _lbfgs(data, problems, dtype, finished, max_steps - used)
            used += more
        parts.append(problems.w)
        steps = max(steps, used)
    return torch.cat(parts).reshape(start.shape), steps


def _evaluate(
    data: _Data, problems: _Problems, w: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Losses [B] and gradients [B, R+1] at w [B, R+1], in one pass over the features."""
    weights = (w[:, :-1] @ data.basis.T).to(dtype)
    bias = w[:, -1:].to(dtype)
    gradient = torch.zeros(len(w), data.rows.shape[1], dtype=torch.float64)
    intercept = torch.zeros(len(w), dtype=torch.float64)
    loss = 0.5 * (problems.ridge * w.square()).sum(dim=1)
    for place, block in placed_blocks(data.rows, dtype):
        signs = data.signs[:, place].to(dtype).index_select(0, problems.target)
        margin = torch.addmm(bias, weights, block.T).mul_(signs).neg_()  # [B, n], > 0 where wrong
        # The loss only sets the scale of the tolerance: float32 is enough, and four times faster.
        log_loss = torch.nn.functional.softplus(margin.float()).mul_(signs.abs())
        loss += log_loss.sum(dim=1, dtype=torch.float64)
        residual = torch.sigmoid_(margin).mul_(signs).neg_()
        gradient += residual @ block
        intercept += residual.sum(dim=1, dtype=torch.float64)
    gradient = torch.cat([gradient @ data.basis, intercept[:, None]], dim=1)
    return loss, gradient + problems.ridge * w


def _lbfgs(
    data: _Data,
    problems: _Problems,
    dtype: torch.dtype,
    finished: Callable[[_Problems, Tensor], Tensor],
    max_steps: int,
) -> tuple[_Problems, int]:
    """Go on until each problem is finished; each step tries one point of each problem.

    A trial is taken unless the slope there says that it went too far (the approximate Wolfe
    condition, which needs no difference of losses and so works at the limit of the precision). In
    either case it tells the curvature on the way, so that the next direction is a better one.

    Reference:
        Hager & Zhang, A new conjugate gradient method with guaranteed descent and an efficient
        line search, SIAM J. Optim. 16 (2005), eq. 4.1 with delta = 0.1.
    """
    problems.loss, problems.gradient = _evaluate(data, problems, problems.w, dtype)
    problems.length = torch.ones_like(problems.loss)
    parts = []
    step = 1
    while True:
        direction = -_two_loop(problems)
        done = finished(problems, direction)
        if bool(done.all()) or step >= max_steps:
            return _Problems.join([*parts, problems]), step
        if float(done.double().mean()) >= _DROP:
            parts.append(problems.keep(done))
            problems, direction = problems.keep(~done), direction[~done]
        change = problems.length[:, None] * direction
        loss, gradient = _evaluate(data, problems, problems.w + change, dtype)
        pair = _pair(change, gradient - problems.gradient, problems.ridge)
        problems.history = [*problems.history[1 - _HISTORY :], pair]
        slope = -(problems.gradient * direction).sum(dim=1)
        taken = (gradient * direction).sum(dim=1) <= 0.8 * slope
        problems.w = torch.where(taken[:, None], problems.w + change, problems.w)
        problems.gradient = torch.where(taken[:, None], gradient, problems.gradient)
        problems.loss = torch.where(taken, loss, problems.loss)
        problems.length = torch.where(taken, torch.ones_like(loss), _SHRINK * problems.length)
        step += 1


def _left_to_gain(problems: _Problems, direction: Tensor) -> Tensor:
    """How far each loss is above its optimum at most, [B].

    The penalty bends the loss by at least its strength, which bounds the weights' share; the
    intercept, which is not penalised, is covered by the decrease that L-BFGS itself foresees.
    """
    gradient = problems.gradient
    weights = gradient[:, :-1].square().sum(dim=1) / (2 * problems.ridge[:, 0])
    return weights - (gradient * direction).sum(dim=1) / 2


def _two_loop(problems: _Problems) -> Tensor:
    """The inverse Hessian's estimate times the gradient, [B, R+1]."""
    q = problems.gradient.clone()
    shares = []
    for change, difference, rho in reversed(problems.history):
        share = rho * (change * q).sum(dim=1)
        q -= share[:, None] * difference
        shares.append(share)
    q *= problems.inverse
    if problems.history:
        # Scale the first guess to the curvature met last.
        _, difference, rho = problems.history[-1]
        met = rho * (difference * problems.inverse * difference).sum(dim=1)
        q *= torch.where(met > 0, 1 / met.clamp(min=1e-300), torch.ones_like(met))[:, None]
    for (change, difference, rho), share in zip(problems.history, reversed(shares), strict=True):
        back = rho * (difference * q).sum(dim=1)
        q += (share - back)[:, None] * change
    return q


def _pair(change: Tensor, difference: Tensor, ridge: Tensor) -> _Pair:
    curvature = (change * difference).sum(dim=1)
    # The penalty alone bends the loss by this much; less is rounding, of a problem that stands
    # still, and its pair gets weight 0.
    least = 0.5 * (ridge * change.square()).sum(dim=1) + 1e-200
    rho = torch.where(curvature > least, 1 / curvature, torch.zeros_like(curvature))
    return change, difference, rho
