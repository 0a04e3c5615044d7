"""Linear probes on frozen features: every target and every penalty solved together.

Findings and sex are logistic regressions, age, weight and BMI ridge regressions. Both are fitted
on the training split; the penalty is chosen on the validation split, for each target by itself.

Features may be arrays in memory or `FeatureRows` on disk. The latter are held in memory where a
split takes less than `HELD_BYTES`, and read block by block in each step where it takes more. Then
memory holds blocks and logits, [D, D] matrices, some 50 numbers a problem and feature, and a few
copies of the labels, but never N x D numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfray.errors import InputError
from selfray.evals.feature_rows import (
    FeatureRows,
    HeldRows,
    RowBlocks,
    placed_blocks,
    row_blocks,
)
from selfray.evals.logistic_solver import solve_logistic
from selfray.evals.metrics import auroc_by_column, r2_by_column

# Penalties on standardised features. The range was chosen so that the best penalty of 384 features
# of 300 to 30,000 images falls inside it.
STRENGTHS: tuple[float, ...] = tuple(float(s) for s in np.logspace(-2, 5, 15))
REAL_TARGETS = ("age_years", "weight_kg", "bmi")

_SCORED_BYTES = 2**28  # predictions on the validation split in memory at once

Features = np.ndarray | Tensor | FeatureRows  # [N, D]
_Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # known and predicted [N, T] to [T]


@dataclass(frozen=True)
class Standardizer:
    """The shift and scale that give the training split mean 0 and standard deviation 1.

    Attributes:
        mean: [D] float64.
        scale: [D] float64, 1 where a feature is constant.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Features) -> Standardizer:
        """Measure the training split.

        Args:
            features: [N, D].

        Raises:
            InputError: No rows, or a value that is not finite.

        Reference:
            Chan, Golub & LeVeque, Algorithms for computing the sample variance, Am. Stat. 37
            (1983), eq. 2.1: how the blocks' means and squares are merged.
        """
        rows = _rows(features)
        count = 0
        mean = squares = torch.zeros(rows.shape[1], dtype=torch.float64)
        for block in rows.blocks(torch.float64):
            total = count + len(block)
            block_mean = block.mean(dim=0)
            apart = block_mean - mean
            squares = squares + (block - block_mean).square().sum(dim=0)
            squares = squares + apart.square() * (count * len(block) / total)
            mean = mean + apart * (len(block) / total)
            count = total
        scale = (squares / count).sqrt()
        # A feature that varies only by rounding is constant; dividing by it would make noise of it.
        constant = scale <= 1e-7 * mean.abs().clamp(min=1e-30)
        return cls(mean, torch.where(constant, torch.ones_like(scale), scale))

    def __call__(self, features: np.ndarray | Tensor) -> Tensor:
        """Standardise features [N, D]; float64."""
        return (_matrix(features) - self.mean) / self.scale

    def rows(self, features: Features) -> RowBlocks:
        """Standardised features [N, D] as blocks of rows; large ones on disk stay there.

        Raises:
            InputError: No rows, or a value that is not finite.
        """
        if isinstance(features, FeatureRows):
            return row_blocks(features, self.mean, self.scale)
        return HeldRows(self(features))


@dataclass(frozen=True)
class LogisticProbe:
    """Logistic regressions for each penalty and target.

    Attributes:
        weights: [S, T, D] float64; NaN for targets that are not defined.
        biases: [S, T] float64.
        defined: bool [T]; False where the training labels hold one class only.
        steps: Solver steps of the slowest problem.
    """

    weights: Tensor
    biases: Tensor
    defined: Tensor
    steps: int

    def logits(self, features: Features | RowBlocks) -> Tensor:
        """Logits [N, S, T] of features [N, D], standardised; float64."""
        return _affine(_rows(features), self.weights, self.biases)


@dataclass(frozen=True)
class RidgeProbe:
    """Ridge regressions for each penalty and target.

    Attributes:
        weights: [S, T, D] float64; NaN for targets that are not defined.
        biases: [S, T] float64.
        defined: bool [T]; False where fewer than two different training values are known.
    """

    weights: Tensor
    biases: Tensor
    defined: Tensor

    def predict(self, features: Features | RowBlocks) -> Tensor:
        """Predictions [N, S, T] of features [N, D], standardised; float64."""
        return _affine(_rows(features), self.weights, self.biases)


def fit_logistic(
    features: Features | RowBlocks,
    labels: np.ndarray | Tensor,
    strengths: Sequence[float],
    *,
    tolerance: float = 1e-7,
    max_steps: int = 1000,
) -> LogisticProbe:
    """Fit a logistic regression for each target and penalty, all in one batched solve.

    The objective is scikit-learn's `LogisticRegression(C=1 / strength)`: the sum over labelled rows
    of the log-loss, plus strength / 2 times the squared norm of the weights; the intercept is free.

    Args:
        features: [N, D], standardised; see `Standardizer.rows`.
        labels: [N, T]: 1, 0, or NaN where it is not known.
        strengths: S penalties, each > 0.
        tolerance: The loss ends at most this fraction above the optimum, or `max_steps` stops it.
        max_steps: Solver steps at most.

    Raises:
        InputError: Features that are not finite, labels other than 1, 0 and NaN, a penalty <= 0.
    """
    rows, labels = _rows(features), _as_float64(labels)
    _require_strengths(strengths)
    known = ~labels.isnan()
    values = torch.nan_to_num(labels)
    if not bool(((values == 0) | (values == 1)).all()):
        raise InputError("probe labels hold a value other than 1, 0 and null. Binarise them first.")
    positives, counts = (values * known).sum(dim=0), known.sum(dim=0)
    defined = (positives > 0) & (positives < counts)
    shape = (len(strengths), labels.shape[1])
    weights = torch.full((*shape, rows.shape[1]), torch.nan, dtype=torch.float64)
    biases = torch.full(shape, torch.nan, dtype=torch.float64)
    steps = 0
    if bool(defined.any()):
        weights[:, defined], biases[:, defined], steps = solve_logistic(
            rows,
            labels[:, defined],
            torch.tensor(strengths, dtype=torch.float64),
            tolerance=tolerance,
            max_steps=max_steps,
        )
    return LogisticProbe(weights, biases, defined, steps)


def fit_ridge(
    features: Features | RowBlocks, targets: np.ndarray | Tensor, strengths: Sequence[float]
) -> RidgeProbe:
    """Fit a ridge regression for each target and penalty, in closed form.

    The objective is scikit-learn's `Ridge(alpha=strength)`: the sum over known rows of squared
    errors, plus strength times the squared norm of the weights; the intercept is free. Targets that
    are known on the same rows share one eigendecomposition.

    Args:
        features: [N, D], standardised; see `Standardizer.rows`.
        targets: [N, T], NaN where it is not known.
        strengths: S penalties, each > 0.

    Raises:
        InputError: Features that are not finite, infinite targets, a penalty <= 0.
    """
    rows, targets = _rows(features), _as_float64(targets)
    _require_strengths(strengths)
    if bool(targets.isinf().any()):
        raise InputError("probe targets hold an infinite value. Make it null, or correct it.")
    penalty = torch.tensor(strengths, dtype=torch.float64)
    shape = (len(strengths), targets.shape[1])
    weights = torch.full((*shape, rows.shape[1]), torch.nan, dtype=torch.float64)
    biases = torch.full(shape, torch.nan, dtype=torch.float64)
    defined = torch.tensor([_varies(column) for column in targets.T], dtype=torch.bool)
    patterns: dict[bytes, list[int]] = {}
    for t in defined.nonzero().flatten().tolist():
        patterns.setdefault(targets[:, t].isnan().numpy().tobytes(), []).append(t)
    for columns in patterns.values():
        mean_x, gram, mean_y, products = _moments(rows, targets[:, columns])
        eigenvalues, basis = torch.linalg.eigh(gram)
        projected = basis.T @ products  # [D, T']
        shrunk = projected / (eigenvalues.clamp(min=0)[:, None] + penalty[:, None, None])
        weights[:, columns] = (basis @ shrunk).mT
        biases[:, columns] = mean_y - weights[:, columns] @ mean_x
    return RidgeProbe(weights, biases, defined)


def _moments(rows: RowBlocks, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features' means [D] and centred products [D, D], targets' means [T] and their centred
    products with the features [D, T], over the rows on which the targets [N, T] are known."""
    known = ~targets[:, 0].isnan()
    mean_y = targets[known].mean(dim=0)
    d = rows.shape[1]
    mean_x = torch.zeros(d, dtype=torch.float64)
    for place, block in placed_blocks(rows, torch.float64):
        mean_x += block[known[place]].sum(dim=0) / known.sum()
    gram, products = torch.zeros(d, d).double(), torch.zeros(d, targets.shape[1]).double()
    for place, block in placed_blocks(rows, torch.float64):
        here = known[place]
        x = block[here] - mean_x
        gram += x.T @ x
        products += x.T @ (targets[place][here] - mean_y)
    return mean_x, gram, mean_y, products


@dataclass(frozen=True)
class ProbeData:
    """Features and targets of the images of one split.

    Attributes:
        features: [N, D], not standardised, in memory or on disk.
        targets: [N, K] float64, NaN where it is not known; binary ones are 1/0.
        names: K names.
        numbers: Names of the real-valued targets; all others are binary.
    """

    features: Features
    targets: np.ndarray
    names: tuple[str, ...]
    numbers: frozenset[str] = frozenset(REAL_TARGETS)

    def columns(self, *, real: bool) -> list[int]:
        """Positions of the real-valued targets, or of the binary ones."""
        return [k for k, name in enumerate(self.names) if (name in self.numbers) == real]

    def take(self, rows: np.ndarray) -> ProbeData:
        """The images at these positions, int64 [n]; features on disk stay there."""
        features = self.features
        if isinstance(features, FeatureRows):
            features = FeatureRows(features.arrays, features.rows[rows])
        else:
            features = features[rows]
        return replace(self, features=features, targets=self.targets[rows])


@dataclass(frozen=True)
class FittedProbes:
    """One linear probe a target, the penalty already chosen.

    Attributes:
        standardizer: Of the training split.
        weights: By target, [D] float64.
        biases: By target.
        strengths: By target, the chosen penalty.
        undefined: Why a target has no probe, by target.
        numbers: Names of the real-valued targets.
    """

    standardizer: Standardizer
    weights: dict[str, Tensor]
    biases: dict[str, float]
    strengths: dict[str, float]
    undefined: dict[str, str]
    numbers: frozenset[str]

    def predict(self, features: Features) -> dict[str, np.ndarray]:
        """Predictions by target, float64 [N].

        Binary targets are given as the probability of a 1, the logistic regression's own (the
        logistic function of its logit, 0 to 1), which calibration can be judged by; real-valued
        ones in their unit.

        Args:
            features: [N, D], not standardised, in memory or on disk.
        """
        if not self.weights:
            return {}
        weights, biases = torch.stack(list(self.weights.values())), list(self.biases.values())
        outputs = _affine(
            self.standardizer.rows(features),
            weights[None],
            torch.tensor([biases], dtype=torch.float64),
        )[:, 0]
        return {
            name: (values if name in self.numbers else torch.sigmoid(values)).numpy()
            for name, values in zip(self.weights, outputs.T, strict=True)
        }


def select(scores: np.ndarray, strengths: Sequence[float]) -> np.ndarray:
    """The position of the best strength for each target; of equals the highest, the smoothest.

    Args:
        scores: [S, T] on the validation split, higher is better; NaN where not defined.
        strengths: S penalties, or numbers of neighbours.

    Returns:
        int64 [T]; -1 where no score is defined.
    """
    order = np.argsort(-np.asarray(strengths), kind="stable")
    filled = np.where(np.isnan(scores), -np.inf, scores)[order]
    best = order[np.argmax(filled, axis=0)]
    return np.where(np.isnan(scores).all(axis=0), -1, best)


def fit_probes(
    train: ProbeData,
    validate: ProbeData,
    strengths: Sequence[float] = STRENGTHS,
    *,
    tolerance: float = 1e-7,
) -> FittedProbes:
    """Fit on the training split, choose each target's penalty on the validation split.

    Binary targets are chosen by AUROC, real-valued ones by R².

    Args:
        train: Features and targets to fit.
        validate: The same targets of other patients.
        strengths: Penalties to choose from.
        tolerance: See `fit_logistic`.
    """
    standardizer = Standardizer.of(train.features)
    x_train, x_validate = (standardizer.rows(data.features) for data in (train, validate))
    weights: dict[str, Tensor] = {}
    biases: dict[str, float] = {}
    chosen: dict[str, float] = {}
    undefined: dict[str, str] = {}
    for real in (False, True):
        columns = train.columns(real=real)
        if not columns:
            continue
        known = validate.targets[:, columns]
        if real:
            probe = fit_ridge(x_train, train.targets[:, columns], strengths)
            score = r2_by_column
        else:
            probe = fit_logistic(x_train, train.targets[:, columns], strengths, tolerance=tolerance)
            score = auroc_by_column
        scores = _scores(x_validate, probe, known, score)
        lacking = "a second value" if real else "both classes"
        for t, best in enumerate(select(scores, strengths)):
            name = train.names[columns[t]]
            if not probe.defined[t]:
                undefined[name] = f"the train split lacks {lacking}"
            elif best < 0:
                undefined[name] = f"the validate split lacks {lacking}"
            else:
                weights[name] = probe.weights[best, t]
                biases[name] = float(probe.biases[best, t])
                chosen[name] = float(strengths[best])
    return FittedProbes(standardizer, weights, biases, chosen, undefined, train.numbers)


def target_values(column: Callable[[str], np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Collect targets as numbers: findings 1/0, sex 1 for F and 0 for M, NaN where null.

    Args:
        column: Gives a column by name, e.g. `RadiographDataset.column`.
        names: K findings, `sex`, `age_years`, `weight_kg` or `bmi`.

    Returns:
        float64 [N, K].
    """
    sexes: Mapping[object, float] = {"F": 1.0, "M": 0.0}
    columns = [
        np.array([sexes.get(v, np.nan) for v in column(name)]) if name == "sex" else column(name)
        for name in names
    ]
    return np.stack(columns, axis=1).astype(np.float64)


# Fewer penalties and a looser optimum than in `evaluate`: AUROC in the third decimal is enough to
# follow a run, and the run waits for it.
_QUICK_STRENGTHS = tuple(float(s) for s in np.logspace(0, 5, 6))
_QUICK_TOLERANCE = 1e-4


def validation_probe(
    train_features: np.ndarray | Tensor,
    train_labels: np.ndarray,
    validate_features: np.ndarray | Tensor,
    validate_labels: np.ndarray,
    names: Sequence[str],
) -> dict[str, Any]:
    """Judge frozen features during pre-training, on the validation split.

    The penalty is chosen on the same images that are scored, so values are slightly optimistic:
    good for comparing steps of a run, not for reporting.

    Args:
        train_features: [N, D].
        train_labels: [N, K] from `target_values`.
        validate_features: [M, D].
        validate_labels: [M, K].
        names: K names: findings, and `sex` and `age_years` where known.

    Returns:
        `macro_auroc` (mean over findings), `auroc` by finding, `sex_auroc`, `age_r2`, each None
        where not defined, and `n`, the number of validation images.
    """
    train = ProbeData(train_features, train_labels, tuple(names))
    validate = ProbeData(validate_features, validate_labels, tuple(names))
    probes = fit_probes(train, validate, _QUICK_STRENGTHS, tolerance=_QUICK_TOLERANCE)
    predictions = probes.predict(validate_features)
    scores: dict[str, float | None] = {}
    for k, name in enumerate(names):
        if name not in predictions:
            scores[name] = None
            continue
        score = r2_by_column if name in REAL_TARGETS else auroc_by_column
        scores[name] = float(score(validate_labels[:, [k]], predictions[name][:, None])[0])
    findings = {name: scores[name] for name in names if name not in (*REAL_TARGETS, "sex")}
    defined = [score for score in findings.values() if score is not None]
    return {
        "macro_auroc": float(np.mean(defined)) if defined else None,
        "auroc": findings,
        "sex_auroc": scores.get("sex"),
        "age_r2": scores.get("age_years"),
        "n": len(validate_labels),
    }


def _as_float64(values: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(values).detach().to("cpu", torch.float64)


def _rows(features: Features | RowBlocks) -> RowBlocks:
    """Features as they are, as blocks of rows."""
    if isinstance(features, FeatureRows):
        zeros = torch.zeros(features.shape[1], dtype=torch.float64)
        return row_blocks(features, zeros, zeros + 1)
    return HeldRows(_matrix(features)) if isinstance(features, np.ndarray | Tensor) else features


def _matrix(features: np.ndarray | Tensor) -> Tensor:
    features = _as_float64(features)
    if features.ndim != 2 or not len(features):
        raise InputError(f"features are of shape {tuple(features.shape)}, not [N, D] with N >= 1")
    finite = features.isfinite().all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise InputError(f"features of row {row} are not finite. Extract them again.")
    return features


def _require_strengths(strengths: Sequence[float]) -> None:
    if not len(strengths) or min(strengths) <= 0:
        raise InputError(f"strengths are {list(strengths)}; give at least one, each above 0")


def _varies(column: Tensor) -> bool:
    known = column[~column.isnan()]
    return len(known) > 1 and bool((known != known[0]).any())


def _affine(rows: RowBlocks, weights: Tensor, biases: Tensor) -> Tensor:
    """Outputs [N, S, T] of weights [S, T, D] and biases [S, T]."""
    s, t, d = weights.shape
    outputs = torch.empty(rows.shape[0], s, t, dtype=torch.float64)
    for place, block in placed_blocks(rows, torch.float64):
        outputs[place] = (block @ weights.reshape(s * t, d).T).reshape(-1, s, t) + biases
    return outputs


def _scores(
    rows: RowBlocks, probe: LogisticProbe | RidgeProbe, known: np.ndarray, score: _Score
) -> np.ndarray:
    """The score [S, T] of each penalty and target, as many penalties at a time as memory allows."""
    size = max(1, _SCORED_BYTES // (8 * known.size))
    scores = []
    for weights, biases in zip(probe.weights.split(size), probe.biases.split(size), strict=True):
        outputs = _affine(rows, weights, biases).numpy()
        scores += [score(known, outputs[:, s]) for s in range(len(biases))]
    return np.stack(scores)
