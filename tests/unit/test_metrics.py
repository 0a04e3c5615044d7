"""Point metrics: nulls left out, one class not defined, the quick ones equal to scikit-learn's."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

from selfray.evals.metrics import auroc_by_column, binary_metrics, r2_by_column, real_metrics

columns = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, np.nan]), st.integers(0, 4)), min_size=4, max_size=30
)


@settings(max_examples=100, deadline=None)
@given(columns)
def test_auroc_by_column_is_scikit_learns_with_ties_and_nulls(column):
    labels, scores = (np.array(values, float) for values in zip(*column, strict=True))
    value = auroc_by_column(labels[:, None], scores[:, None])[0]
    known = ~np.isnan(labels)
    if len(set(labels[known])) < 2:
        assert np.isnan(value)
    else:
        np.testing.assert_allclose(value, roc_auc_score(labels[known], scores[known]), atol=1e-12)


def test_r2_by_column_is_scikit_learns_with_nulls():
    rng = np.random.default_rng(0)
    targets = rng.normal(60, 10, (50, 3))
    predictions = targets + rng.normal(0, [1, 5, 20], (50, 3))
    targets[:20, 1] = np.nan
    targets[:, 2] = 60
    values = r2_by_column(targets, predictions)
    np.testing.assert_allclose(values[0], r2_score(targets[:, 0], predictions[:, 0]))
    np.testing.assert_allclose(values[1], r2_score(targets[20:, 1], predictions[20:, 1]))
    assert np.isnan(values[2])


def test_null_labels_are_left_out_of_binary_metrics():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 60).astype(float), rng.normal(size=60)
    labels[:20] = np.nan
    metrics = binary_metrics(labels, scores)
    assert metrics["auroc"] == roc_auc_score(labels[20:], scores[20:])
    assert metrics["auprc"] == average_precision_score(labels[20:], scores[20:])


def test_null_values_are_left_out_of_real_metrics():
    rng = np.random.default_rng(0)
    targets = rng.normal(60, 10, 50)
    predictions = targets + rng.normal(0, 5, 50)
    targets[:10] = np.nan
    metrics = real_metrics(targets, predictions)
    np.testing.assert_allclose(metrics["pearson"], pearsonr(targets[10:], predictions[10:])[0])
    np.testing.assert_allclose(metrics["mae"], np.abs(targets - predictions)[10:].mean())
    np.testing.assert_allclose(metrics["r2"], r2_score(targets[10:], predictions[10:]))


def test_one_class_constant_targets_and_constant_predictions_are_not_defined():
    ones = np.array([1.0, 1.0, np.nan])
    assert np.isnan(list(binary_metrics(ones, np.arange(3.0)).values())).all()
    assert np.isnan(list(real_metrics(ones, np.arange(3.0)).values())).all()
    flat = real_metrics(np.array([1.0, 2.0, 3.0]), np.full(3, 2.0))
    assert np.isnan(flat["pearson"]) and flat["r2"] == 0
