"""Uncertainty: the bootstrap by patient, vectorised over resamples and paired between encoders.

Patients are drawn with replacement, and all images of a patient go along, because two images of one
patient are no two pieces of evidence. A resample is kept as the number of times that each patient
was drawn, which then weighs the patient's images; every metric here takes such weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95

_ELEMENTS = 4_000_000  # weights in memory at once (resamples x images)
_STREAM = 0x626F6F74  # "boot": keeps these numbers apart from other uses of the same seed


@dataclass(frozen=True)
class Interval:
    """A percentile interval.

    Attributes:
        low: Lower end; NaN where the interval is not defined.
        high: Upper end.
        left_out: Resamples in which the metric was not defined (one class only).
    """

    low: float
    high: float
    left_out: int


class PatientResamples:
    """The same resamples of patients for every metric, target and encoder, which pairs them.

    Resample r is a function of (seed, r) and the number of patients alone.

    Args:
        patients: [N] identifiers, one an image.
        count: R, how many resamples.
        seed: 0 to 2**32 - 1.
    """

    def __init__(
        self, patients: Sequence[str] | np.ndarray, count: int = RESAMPLES, seed: int = 0
    ) -> None:
        names, self.patient_of_image = np.unique(np.asarray(patients), return_inverse=True)
        self.n_patients = len(names)
        self.multiplicity = np.empty((count, self.n_patients), np.uint16)  # [R, P]
        for r in range(count):
            generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=r << 64))
            drawn = generator.integers(self.n_patients, size=self.n_patients)
            self.multiplicity[r] = np.bincount(drawn, minlength=self.n_patients)

    def weights(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Weights of some images, float64 [r, n] in blocks of resamples, R in all.

        Args:
            rows: [n] positions of images.
        """
        block = max(1, _ELEMENTS // max(1, len(rows)))
        for start in range(0, len(self.multiplicity), block):
            part = self.multiplicity[start : start + block]
            yield part[:, self.patient_of_image[rows]].astype(np.float64)


Resampled = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]


def resample(
    metrics: Resampled, known: np.ndarray, predictions: np.ndarray, resamples: PatientResamples
) -> dict[str, np.ndarray]:
    """The distribution of metrics over the resamples.

    Args:
        metrics: `binary_resampled` or `real_resampled`.
        known: [N] labels or values; NaN ones are left out.
        predictions: [N].
        resamples: Of the patients of these N images.

    Returns:
        By metric, float64 [R]; NaN where a resample does not define it.
    """
    rows = np.flatnonzero(~np.isnan(known))
    parts = [metrics(known[rows], predictions[rows], w) for w in resamples.weights(rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interval(values: np.ndarray, level: float = LEVEL) -> Interval:
    """The percentile interval of a resampled metric, or of a difference of two.

    Args:
        values: [R], NaN where not defined.
        level: Nominal coverage, 0 to 1.

    Returns:
        The interval; not defined (NaN) when more than half of the resamples were left out.
    """
    defined = values[~np.isnan(values)]
    left_out = len(values) - len(defined)
    if left_out * 2 > len(values):
        return Interval(np.nan, np.nan, left_out)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), left_out)


def binary_resampled(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Weighted AUROC and average precision for many weightings at once, ties exact.

    Args:
        labels: [n], 1 or 0.
        scores: [n], higher means more likely 1.
        weights: [r, n], >= 0.

    Returns:
        `auroc` and `auprc`, float64 [r]; NaN where a class weighs nothing.

    Reference:
        The definitions of scikit-learn's `roc_auc_score` and `average_precision_score` with
        `sample_weight`: thresholds at distinct scores; precision is not interpolated.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    firsts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # of each group of ties
    w = weights[:, order]
    positive = np.add.reduceat(w * labels[order], firsts, axis=1)  # [r, groups]
    total = np.add.reduceat(w, firsts, axis=1)
    negative = total - positive
    n_positive, n_negative = positive.sum(axis=1), negative.sum(axis=1)
    true, flagged = np.cumsum(positive, axis=1), np.cumsum(total, axis=1)
    false = flagged - true
    # A positive beats the negatives that come after its group, and half of those in it.
    beaten = n_negative[:, None] - false + negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (positive * beaten).sum(axis=1) / (n_positive * n_negative)
        precision = np.where(flagged > 0, true / flagged, 0)
        auprc = (positive * precision).sum(axis=1) / n_positive
    one_class = (n_positive == 0) | (n_negative == 0)
    auroc[one_class] = auprc[one_class] = np.nan
    return {"auroc": auroc, "auprc": auprc}


def real_resampled(
    targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Weighted R², mean absolute error and Pearson's correlation for many weightings at once.

    Args:
        targets: [n].
        predictions: [n], same unit.
        weights: [r, n], >= 0.

    Returns:
        `r2`, `mae`, `pearson`, float64 [r]; NaN where the weighted targets do not vary, `pearson`
        also where the weighted predictions do not.
    """
    error = targets - predictions
    # Centred first, so that sums of squares do not cancel.
    y, p = targets - targets.mean(), predictions - predictions.mean()
    columns = np.stack([np.ones_like(y), y, p, y * y, p * p, y * p, error**2, np.abs(error)])
    total, *sums = (weights @ columns.T).T
    with np.errstate(invalid="ignore", divide="ignore"):
        y1, p1, yy, pp, yp, squared, absolute = (s / total for s in sums)
        var_y, var_p = yy - y1**2, pp - p1**2
        tiny_y, tiny_p = 1e-12 * np.mean(y * y), 1e-12 * np.mean(p * p)
        defined = var_y > tiny_y
        pearson = (yp - y1 * p1) / np.sqrt(var_y * var_p)
        return {
            "r2": np.where(defined, 1 - squared / var_y, np.nan),
            "mae": np.where(defined, absolute, np.nan),
            "pearson": np.where(defined & (var_p > tiny_p), pearson, np.nan),
        }
