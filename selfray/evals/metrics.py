"""Point metrics: how well predictions agree with what is known. Null labels are left out."""

from __future__ import annotations

import numpy as np

BINARY_METRICS = ("auroc", "auprc")
REAL_METRICS = ("r2", "mae", "pearson")


def binary_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve, and average precision (whose floor is the prevalence).

    Args:
        labels: [N]: 1, 0, or NaN where it is not known.
        scores: [N], higher means more likely 1; probabilities or logits.

    Returns:
        `auroc`, `auprc` (0 to 1); NaN both where one class only is known.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    known = ~np.isnan(labels)
    y, s = labels[known], scores[known]
    if len(np.unique(y)) < 2:
        return dict.fromkeys(BINARY_METRICS, np.nan)
    return {
        "auroc": float(roc_auc_score(y, s)),
        "auprc": float(average_precision_score(y, s)),
    }


def real_metrics(targets: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Coefficient of determination, mean absolute error, and Pearson's correlation.

    Args:
        targets: [N], NaN where it is not known.
        predictions: [N], in the target's unit.

    Returns:
        `r2`, `mae` (the target's unit), `pearson`; NaN all where fewer than two different values
        are known, `pearson` also where the predictions are all the same.
    """
    from sklearn.metrics import mean_absolute_error, r2_score

    known = ~np.isnan(targets)
    y, p = targets[known], predictions[known]
    if len(np.unique(y)) < 2:
        return dict.fromkeys(REAL_METRICS, np.nan)
    varies = len(np.unique(p)) > 1
    return {
        "r2": float(r2_score(y, p)),
        "mae": float(mean_absolute_error(y, p)),
        "pearson": float(np.corrcoef(y, p)[0, 1]) if varies else np.nan,
    }


def auroc_by_column(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column; faster than `binary_metrics` for many columns.

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
