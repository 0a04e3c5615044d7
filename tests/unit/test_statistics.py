"""The bootstrap: weighted metrics against scikit-learn, patients kept whole, honest coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, norm
from sklearn.metrics import (
    average_precision_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)

from selfray.evals import bootstrap as by_patient
from selfray.evals.bootstrap import PatientResamples, interval, resample
from selfray.evals.metrics import binary_resampled, real_resampled


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_weighted_binary_metrics_are_scikit_learns_with_ties(levels):
    rng = np.random.default_rng(levels)
    labels, scores = rng.integers(0, 2, 50).astype(float), rng.integers(0, levels, 50).astype(float)
    weights = rng.integers(0, 4, (40, 50)).astype(float)
    ours = binary_resampled(labels, scores, weights)
    for r, w in enumerate(weights):
        expected = roc_auc_score(labels, scores, sample_weight=w)
        assert ours["auroc"][r] == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score(labels, scores, sample_weight=w)
        assert ours["auprc"][r] == pytest.approx(expected, abs=1e-12)


def test_weighted_real_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    targets = rng.normal(1000, 3, 60)  # far from 0: sums of squares must not cancel
    predictions = targets + rng.normal(0, 2, 60)
    weights = rng.integers(0, 4, (20, 60)).astype(float)
    ours = real_resampled(targets, predictions, weights)
    for r, w in enumerate(weights):
        assert ours["r2"][r] == pytest.approx(r2_score(targets, predictions, sample_weight=w))
        mae = mean_absolute_error(targets, predictions, sample_weight=w)
        assert ours["mae"][r] == pytest.approx(mae)
        repeated = np.repeat(np.stack([targets, predictions]), w.astype(int), axis=1)
        assert ours["pearson"][r] == pytest.approx(np.corrcoef(repeated)[0, 1])


def test_resamples_of_one_class_are_not_defined_and_are_counted():
    labels, scores = np.array([1.0, 0, 0, 0]), np.array([0.9, 0.1, 0.5, 0.95])
    resamples = PatientResamples(["a", "b", "c", "d"], count=400)
    metrics = resample(binary_resampled, labels, scores, resamples)
    auroc = metrics["auroc"]
    counts = resamples.multiplicity
    lacking = (counts[:, 0] == 0) | (counts[:, 1:].sum(axis=1) == 0)
    np.testing.assert_array_equal(np.isnan(auroc), lacking)
    np.testing.assert_array_equal(np.isnan(metrics["auprc"]), lacking)
    assert interval(auroc).left_out == lacking.sum() > 50
    constant = real_resampled(np.array([3.0, 3.0, 4.0]), np.arange(3.0), np.array([[1.0, 1, 0]]))
    assert np.isnan(constant["r2"]).all() and np.isnan(constant["pearson"]).all()


def test_an_interval_of_mostly_undefined_resamples_is_not_defined():
    values = np.full(100, np.nan)
    values[:49] = 0.5
    bounds = interval(values)
    assert np.isnan(bounds.low) and np.isnan(bounds.high) and bounds.left_out == 51


def test_all_images_of_a_patient_are_drawn_together():
    patients = np.array(["p1", "p2", "p1", "p3", "p2", "p1"])
    resamples = PatientResamples(patients, count=50, seed=1)
    weights = np.concatenate(list(resamples.weights(np.arange(6))))
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 0], weights[:, 5])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    # As many patients are drawn as there are.
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), 3)
    assert weights[:, 3].std() > 0


def test_a_resample_depends_on_seed_and_number_alone(monkeypatch):
    patients = [str(p) for p in range(30)]
    many, few = PatientResamples(patients, count=50, seed=4), PatientResamples(patients, 10, seed=4)
    np.testing.assert_array_equal(many.multiplicity[:10], few.multiplicity)
    other = PatientResamples(patients, 50, seed=5)
    assert (many.multiplicity != other.multiplicity).any(axis=1).all()
    assert len(np.unique(many.multiplicity, axis=0)) == 50
    rows = np.arange(30)
    whole = np.concatenate(list(many.weights(rows)))
    monkeypatch.setattr(by_patient, "_FEWEST", 3)
    np.testing.assert_array_equal(np.concatenate(list(many.weights(rows))), whole)


def test_two_encoders_that_agree_have_a_difference_of_exactly_zero():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 80).astype(float), rng.normal(size=80)
    resamples = PatientResamples(rng.integers(0, 40, 80).astype(str))
    a = resample(binary_resampled, labels, scores, resamples)["auroc"]
    b = resample(binary_resampled, labels, 3 * scores + 1, resamples)["auroc"]
    assert interval(a - b) == by_patient.Interval(0.0, 0.0, 0)


def test_intervals_are_those_of_scipys_bootstrap_over_patients():
    """R² of one encoder and of two on the same patients, from sums that SciPy resamples."""
    rng = np.random.default_rng(5)
    patients = np.repeat(np.arange(40), rng.integers(1, 5, 40))
    shared = rng.normal(size=40)[patients]  # images of a patient are alike
    targets = shared + 0.3 * rng.normal(size=len(patients))
    one, two = (0.8 * targets + s * rng.normal(size=len(patients)) for s in (0.3, 0.5))
    columns = (
        np.ones_like(targets),
        targets,
        targets**2,
        (targets - one) ** 2,
        (targets - two) ** 2,
    )
    sums = [np.bincount(patients, weights=column) for column in columns]

    def r2(n, y, yy, error, other=0.0, *, axis):
        left = error.sum(axis) - (other.sum(axis) if isinstance(other, np.ndarray) else 0)
        total = yy.sum(axis) - y.sum(axis) ** 2 / n.sum(axis)
        return -left / total + (0 if isinstance(other, np.ndarray) else 1)

    resamples = PatientResamples(patients.astype(str), count=4000)
    ours = [resample(real_resampled, targets, p, resamples)["r2"] for p in (one, two)]
    for values, data in ((ours[0], sums[:4]), (ours[0] - ours[1], sums)):
        theirs = bootstrap(
            data, r2, paired=True, vectorized=True, n_resamples=4000, method="percentile",
            random_state=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        bounds, width = interval(values), theirs.high - theirs.low
        assert bounds.low == pytest.approx(theirs.low, abs=0.08 * width)
        assert bounds.high == pytest.approx(theirs.high, abs=0.08 * width)


def coverage(by_patient: bool, studies: int = 200) -> float:
    """How often the interval holds the true AUROC when a patient has four alike images."""
    truth = norm.cdf(1 / np.sqrt(2))  # two normal classes, one standard deviation apart
    held = 0
    for study in range(studies):
        rng = np.random.default_rng([11, study])
        labels = np.repeat((np.arange(60) % 2).astype(float), 4)
        shared, own = rng.normal(size=60).repeat(4), rng.normal(size=240)
        scores = labels + np.sqrt(0.9) * shared + np.sqrt(0.1) * own
        patients = np.arange(60).repeat(4) if by_patient else np.arange(240)
        resamples = PatientResamples(patients.astype(str), count=100, seed=study)
        bounds = interval(resample(binary_resampled, labels, scores, resamples)["auroc"])
        held += bounds.low <= truth <= bounds.high
    return held / studies


def test_intervals_by_patient_cover_the_truth_and_intervals_by_image_do_not():
    assert 0.90 <= coverage(by_patient=True) <= 0.99
    assert coverage(by_patient=False) < 0.8
