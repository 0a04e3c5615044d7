"""Point metrics: how well a prediction agrees with what is known. Null labels are left out."""

from __future__ import annotations

import numpy as np


def auroc_by_column(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column, ties counted half.

    Args:
        labels: [N, T]: 1, 0, or NaN where it is not known.
        scores: [N, T], higher means more likely 1.

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
