"""Metrics: how well predictions agree with what is known. Null labels are left out.

Those whose name ends in `_resampled` take weights of images, many weightings at once: ones for the
metric itself, and how often each image was drawn for its resamples.
"""

from __future__ import annotations

import numpy as np

SPECIFICITIES = (90, 80)  # percent
BINS = 10  # of the reliability curve


def auroc_by_column(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column.

    Args:
        labels: [N, T]: 1, 0, or NaN where it is not known.
        scores: [N, T], higher means more likely 1; ties count half.

    Returns:
        float64 [T]; NaN where one class only is known, or a score is NaN.

    Reference:
        Hanley & McNeil, Radiology 143 (1982): the Mann-Whitney statistic.
    """
    from scipy.stats import rankdata

    values = np.full(labels.shape[1], np.nan)
    for t, (label, score) in enumerate(zip(labels.T, scores.T, strict=True)):
        known = ~np.isnan(label)
        positive = label[known] == 1
        n_positive, n_negative = int(positive.sum()), int((~positive).sum())
        if n_positive and n_negative:
            rank_sum = rankdata(score[known])[positive].sum()
            values[t] = (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    return values


def r2_by_column(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Coefficient of determination of each column.

    Args:
        targets: [N, T], NaN where it is not known.
        predictions: [N, T].

    Returns:
        float64 [T], 1 at best; NaN where fewer than two different values are known.
    """
    known = ~np.isnan(targets)
    count = np.maximum(known.sum(axis=0), 1)
    values = np.where(known, targets, 0)
    total = np.where(known, (values - values.sum(axis=0) / count) ** 2, 0).sum(axis=0)
    error = np.where(known, (values - predictions) ** 2, 0).sum(axis=0)
    return np.where(total > 0, 1 - error / np.where(total > 0, total, 1), np.nan)


def binary_resampled(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """What an order of images is worth, for many weightings at once; ties exact.

    `sensitivity_at_90_specificity` (and `_80_`) is read from the ROC curve of the weighted images
    themselves: the highest sensitivity of any threshold (score >= threshold counts as positive)
    whose specificity is at least 0.9. Nothing is interpolated, no threshold is carried over from
    other images, and where no threshold is specific enough it is 0.

    Args:
        labels: [n], 1 or 0.
        scores: [n], higher means more likely 1.
        weights: [r, n], >= 0, such as how often each image was drawn.

    Returns:
        `auroc`, `auprc`, `sensitivity_at_90_specificity`, `sensitivity_at_80_specificity`,
        float64 [r], 0 to 1; NaN where a class weighs nothing.

    Reference:
        The definitions of scikit-learn's `roc_auc_score`, `average_precision_score` (precision is
        not interpolated) and `roc_curve` with `sample_weight`.
    """
    names = ["auroc", "auprc", *(f"sensitivity_at_{s}_specificity" for s in SPECIFICITIES)]
    if len(np.unique(labels)) < 2:
        return {name: np.full(len(weights), np.nan) for name in names}
    order = np.argsort(-scores, kind="stable")
    positive = labels[order] == 1
    firsts = _firsts(scores[order])  # of each group of ties
    holds = np.logical_or.reduceat(positive, firsts)  # the group has a positive
    # Between groups with a positive, negatives matter by their sum alone: one run is enough.
    kept = holds | np.r_[True, holds[:-1]]
    runs, holds = firsts[kept], holds[kept]
    w = weights.T[order]  # [n, r]: rows of one image are contiguous, sums run along them
    total = np.add.reduceat(w, runs, axis=0)
    flagged = np.cumsum(total, axis=0)[holds]
    run_of_positive = np.searchsorted(runs, np.flatnonzero(positive), side="right")
    hits = np.add.reduceat(w[positive], _firsts(run_of_positive), axis=0)
    true = np.cumsum(hits, axis=0)
    false = flagged - true
    n_positive = true[-1]
    n_negative = total.sum(axis=0) - n_positive
    # A positive beats the negatives that come after its group, and half of those in it.
    beaten = n_negative - false + (total[holds] - hits) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(flagged > 0, true / flagged, 0)
        values = [
            (hits * beaten).sum(axis=0) / (n_positive * n_negative),
            (hits * precision).sum(axis=0) / n_positive,
        ]
        for percent in SPECIFICITIES:
            # Sums of weights are exact to far less than the added share of one image.
            allowed = (1 - percent / 100 + 1e-9) * n_negative
            values.append(np.where(false <= allowed, true, 0).max(axis=0) / n_positive)
    one_class = (n_positive == 0) | (n_negative == 0)
    return {
        name: np.where(one_class, np.nan, value) for name, value in zip(names, values, strict=True)
    }


def calibration_resampled(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Brier score and expected calibration error, for many weightings at once.

    The calibration error is the mean distance, over images, between what was predicted and what was
    found in the image's bin of `reliability_curve`. It is never below 0 and has a bias upward that
    shrinks with the number of images: a perfectly calibrated probe has more than 0.

    Args:
        labels: [n], 1 or 0.
        probabilities: [n], 0 to 1.
        weights: [r, n], >= 0.

    Returns:
        `brier`, `ece`, float64 [r], 0 (best) to 1; NaN where a class weighs nothing.

    Reference:
        Brier, Monthly Weather Review 78 (1950), in scikit-learn's form (`brier_score_loss`); Guo et
        al., On calibration of modern neural networks, ICML 2017, eq. 3, with bins of equal mass
        (Nixon et al., Measuring calibration in deep learning, CVPR workshops 2019).
    """
    if not len(labels):
        return {name: np.full(len(weights), np.nan) for name in ("brier", "ece")}
    total = weights.sum(axis=1)
    n_positive = weights @ labels
    predicted, observed, share = reliability_curve(labels, probabilities, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        brier = weights @ (probabilities - labels) ** 2 / total
    ece = np.nansum(share * np.abs(observed - predicted), axis=1)
    one_class = (n_positive == 0) | (n_positive == total)
    return {
        "brier": np.where(one_class, np.nan, brier),
        "ece": np.where(one_class, np.nan, ece),
    }


def reliability_curve(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What was found against what was predicted: the points of a reliability plot.

    Ten bins of (nearly) as many images each, with edges at the deciles of `probabilities`. The
    edges are those of all images, whatever the weights; ties can leave a bin empty.

    Args:
        labels: [n], 1 or 0.
        probabilities: [n], 0 to 1.
        weights: [r, n], >= 0; ones for the plot's points, resamples for their intervals.

    Returns:
        Mean prediction, share of positives, and share of the images (0 to 1), each float64
        [r, bins]; the first two are NaN in a bin that weighs nothing.

    Reference:
        scikit-learn's `calibration_curve(strategy="quantile")`, which drops empty bins.
    """
    edges = np.quantile(probabilities, np.linspace(0, 1, BINS + 1)[1:-1])
    bins = np.searchsorted(edges, probabilities)
    member = bins[:, None] == np.arange(BINS)  # [n, bins]
    columns = np.concatenate([member, member * probabilities[:, None], member * labels[:, None]], 1)
    mass, predicted, observed = np.split(weights @ columns, 3, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return predicted / mass, observed / mass, mass / weights.sum(axis=1, keepdims=True)


def real_resampled(
    targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Weighted R², mean absolute error and two correlations, for many weightings at once.

    Args:
        targets: [n].
        predictions: [n], same unit.
        weights: [r, n], >= 0, such as how often each image was drawn.

    Returns:
        `r2`, `mae` (the target's unit), `pearson`, `spearman`, float64 [r]; NaN where the weighted
        targets do not vary, the correlations also where the weighted predictions do not.

    Reference:
        scikit-learn's `r2_score` and `mean_absolute_error` with `sample_weight`; SciPy's `pearsonr`
        and `spearmanr` of the sample in which each image stands as often as it weighs.
    """
    if not len(targets):
        return {
            name: np.full(len(weights), np.nan) for name in ("r2", "mae", "pearson", "spearman")
        }
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
        both = defined & (var_p > tiny_p)
        pearson = (yp - y1 * p1) / np.sqrt(var_y * var_p)
    return {
        "r2": np.where(defined, 1 - squared / np.where(defined, var_y, 1), np.nan),
        "mae": np.where(defined, absolute, np.nan),
        "pearson": np.where(both, pearson, np.nan),
        "spearman": np.where(both, _spearman(targets, predictions, weights), np.nan),
    }


def _spearman(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's correlation, float64 [r]: Pearson's of the mean ranks in each weighted sample."""
    w = np.ascontiguousarray(weights.T)  # [n, r]
    y, p = _centred_ranks(targets, w), _centred_ranks(predictions, w)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((w * y * y).sum(axis=0) * (w * p * p).sum(axis=0))
        return (w * y * p).sum(axis=0) / spread


def _centred_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean rank of each image where image i stands weights[i] times, less their mean; [n, r]."""
    order = np.argsort(values, kind="stable")
    firsts = _firsts(values[order])
    total = np.add.reduceat(weights[order], firsts, axis=0)  # [groups, r]
    upto = np.cumsum(total, axis=0)
    ranks = upto - total / 2 - upto[-1] / 2
    group = np.searchsorted(firsts, np.arange(len(values)), side="right") - 1
    centred = np.empty_like(weights)
    centred[order] = ranks[group]
    return centred


def _firsts(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
