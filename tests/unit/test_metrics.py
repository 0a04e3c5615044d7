"""Metrics: nulls left out, one class not defined, values those of scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    roc_curve,
)

from selfray.evals.bootstrap import point
from selfray.evals.metrics import (
    auroc_by_column,
    binary_resampled,
    calibration_resampled,
    r2_by_column,
    real_resampled,
    reliability_curve,
)

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
    metrics = point(binary_resampled, labels, scores)
    assert metrics["auroc"] == roc_auc_score(labels[20:], scores[20:])
    assert metrics["auprc"] == average_precision_score(labels[20:], scores[20:])


def test_null_values_are_left_out_of_real_metrics():
    rng = np.random.default_rng(0)
    targets = rng.normal(60, 10, 50)
    predictions = targets + rng.normal(0, 5, 50)
    targets[:10] = np.nan
    metrics = point(real_resampled, targets, predictions)
    np.testing.assert_allclose(metrics["pearson"], pearsonr(targets[10:], predictions[10:])[0])
    np.testing.assert_allclose(metrics["mae"], np.abs(targets - predictions)[10:].mean())
    np.testing.assert_allclose(metrics["r2"], r2_score(targets[10:], predictions[10:]))


def test_one_class_constant_targets_and_constant_predictions_are_not_defined():
    ones = np.array([1.0, 1.0, np.nan])
    assert np.isnan(list(point(binary_resampled, ones, np.arange(3.0)).values())).all()
    assert np.isnan(list(point(real_resampled, ones, np.arange(3.0)).values())).all()
    flat = point(real_resampled, np.array([1.0, 2.0, 3.0]), np.full(3, 2.0))
    assert np.isnan(flat["pearson"]) and flat["r2"] == 0


def sensitivity(labels, scores, specificity, weights=None) -> float:
    """The highest on scikit-learn's ROC curve with at least this specificity."""
    false, true, _ = roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
    return true[1 - false >= specificity - 1e-9].max()


@pytest.fixture
def quick_scikit_learn():
    """Without the checks of its inputs, which take most of its time on a few images."""
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        yield


def known_cases(count: int, seed: int, classes: int | None):
    """Labels with nulls and predictions with ties: few or many levels, rare or common."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n, levels = rng.integers(12, 60), rng.choice([2, 5, 30, 10**6])
        predictions = rng.integers(0, levels, n) / levels
        if classes:
            known = (rng.random(n) < rng.choice([0.1, 0.5, 0.9])).astype(float)
        else:
            known = rng.integers(0, levels, n) / levels
        known[rng.random(n) < 0.2] = np.nan
        yield known, predictions


@pytest.mark.usefixtures("quick_scikit_learn")
def test_binary_metrics_are_scikit_learns_in_1000_cases():
    compared = 0
    for known, scores in known_cases(1000, 1, classes=2):
        found = point(binary_resampled, known, scores)
        found |= point(calibration_resampled, known, scores)
        y, s = known[~np.isnan(known)], scores[~np.isnan(known)]
        if len(set(y)) < 2:
            assert np.isnan(list(found.values())).all()
            continue
        compared += 1
        expected = {
            "auroc": roc_auc_score(y, s),
            "auprc": average_precision_score(y, s),
            "sensitivity_at_90_specificity": sensitivity(y, s, 0.9),
            "sensitivity_at_80_specificity": sensitivity(y, s, 0.8),
            "brier": brier_score_loss(y, s),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)
    assert compared > 800


@pytest.mark.usefixtures("quick_scikit_learn")
def test_real_metrics_are_scikit_learns_and_scipys_in_1000_cases():
    compared = 0
    for known, predictions in known_cases(1000, 2, classes=None):
        found = point(real_resampled, known, predictions)
        y, p = known[~np.isnan(known)], predictions[~np.isnan(known)]
        if len(set(y)) < 2:
            assert np.isnan(list(found.values())).all()
            continue
        np.testing.assert_allclose(found["r2"], r2_score(y, p), atol=1e-10)
        np.testing.assert_allclose(found["mae"], mean_absolute_error(y, p), atol=1e-12)
        if len(set(p)) < 2:
            assert np.isnan([found["pearson"], found["spearman"]]).all()
            continue
        compared += 1
        np.testing.assert_allclose(found["pearson"], pearsonr(y, p)[0], atol=1e-12)
        np.testing.assert_allclose(found["spearman"], spearmanr(y, p)[0], atol=1e-12)
    assert compared > 800


def test_weighted_spearman_is_scipys_of_the_repeated_sample():
    rng = np.random.default_rng(0)
    for levels in (4, 10**6):
        y, p = rng.integers(0, levels, (2, 40)).astype(float)
        weights = rng.integers(0, 4, (30, 40))
        found = real_resampled(y, p, weights.astype(float))["spearman"]
        for value, w in zip(found, weights, strict=True):
            np.testing.assert_allclose(value, spearmanr(np.repeat(y, w), np.repeat(p, w))[0])


def test_weighted_sensitivity_and_brier_are_scikit_learns():
    rng = np.random.default_rng(0)
    for levels in (3, 20, 10**6):
        y = (rng.random(60) < 0.3).astype(float)
        s = rng.integers(0, levels, 60) / levels
        weights = rng.integers(0, 4, (30, 60)).astype(float)
        binary = binary_resampled(y, s, weights)
        brier = calibration_resampled(y, s, weights)["brier"]
        for r, w in enumerate(weights):
            for percent in (90, 80):
                expected = sensitivity(y, s, percent / 100, w)
                found = binary[f"sensitivity_at_{percent}_specificity"][r]
                np.testing.assert_allclose(found, expected, atol=1e-12)
            np.testing.assert_allclose(brier[r], brier_score_loss(y, s, sample_weight=w))


def test_a_specificity_that_is_met_exactly_counts_as_met():
    """One of ten negatives above the threshold is a specificity of 0.9, whatever floats say."""
    labels = np.r_[np.ones(2), np.zeros(10)]
    scores = np.r_[9.0, 7.0, 8.0, np.arange(6, -3, -1.0)]
    assert point(binary_resampled, labels, scores)["sensitivity_at_90_specificity"] == 1


def test_the_reliability_curve_is_scikit_learns_calibration_curve():
    rng = np.random.default_rng(0)
    for levels in (7, 10**6):
        p = rng.integers(0, levels, 300) / levels
        y = (rng.random(300) < p).astype(float)
        predicted, observed, share = (c[0] for c in reliability_curve(y, p, np.ones((1, 300))))
        filled = share > 0
        theirs = calibration_curve(y, p, n_bins=10, strategy="quantile")
        np.testing.assert_allclose(observed[filled], theirs[0])
        np.testing.assert_allclose(predicted[filled], theirs[1])
        edges = np.quantile(p, np.arange(1, 10) / 10)
        images = np.array([(np.searchsorted(edges, p) == b).sum() for b in range(10)])
        np.testing.assert_allclose(share, images / 300)
        expected = (images[filled] * np.abs(theirs[0] - theirs[1])).sum() / 300
        found = calibration_resampled(y, p, np.ones((1, 300)))["ece"][0]
        np.testing.assert_allclose(found, expected)


def test_the_bins_of_a_resample_are_those_of_all_images():
    rng = np.random.default_rng(1)
    p = rng.random(100)
    y = (rng.random(100) < p).astype(float)
    weights = rng.integers(0, 3, (5, 100)).astype(float)
    bins = np.searchsorted(np.quantile(p, np.arange(1, 10) / 10), p)
    for value, w in zip(calibration_resampled(y, p, weights)["ece"], weights, strict=True):
        gaps = [abs((w * (y - p))[bins == b].sum()) for b in range(10)]
        np.testing.assert_allclose(value, sum(gaps) / w.sum())
