"""Estimates: BCa against SciPy, strata, means over findings and seeds, ranks and subgroups."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, rankdata
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from selfray.evals.bootstrap import (
    Estimate,
    PatientResamples,
    PatientsLeftOut,
    bca_interval,
    estimates,
    interval,
    mean_estimate,
    resample,
    seed_mean,
)
from selfray.evals.metrics import binary_resampled, calibration_resampled, real_resampled
from selfray.evals.ranking import rank_encoders
from selfray.evals.subgroups import age_bands, gap, subgroup_results

SIMULATE = str(Path(__file__).parents[2] / "scripts" / "simulate_statistics.py")
PLENTY = 10**9  # of evidence: Student's t is normal


def a_study(seed: int = 0, patients: int = 60) -> tuple[np.ndarray, ...]:
    """Patients with one to three images, labels, scores of two encoders."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    labels = (rng.random(patients) < 0.3).astype(float)[patient]
    a, b = labels + rng.normal(size=(2, len(patient)))
    return patient, labels, a, b


def test_bca_is_scipys_from_the_same_resamples():
    """The mean error of a skewed sample of 40, one image a patient."""
    errors = np.random.default_rng(0).exponential(size=40) ** 2
    predictions = np.arange(40.0)
    known, jackknife = predictions + errors, PatientsLeftOut(np.arange(40))
    left_out = resample(real_resampled, known, predictions, jackknife)
    theirs = bootstrap(
        (errors,), np.mean, n_resamples=2000, method="BCa", vectorized=True,
        random_state=np.random.default_rng(1),
    )  # fmt: skip
    values, expected = theirs.bootstrap_distribution, theirs.confidence_interval
    found = bca_interval(errors.mean(), values, left_out["mae"], PLENTY)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-6)
    assert interval(values).high < 0.95 * expected.high  # the percentile interval is another


def test_bca_is_expanded_as_students_interval_of_a_mean():
    """Of symmetrical resamples it is point + t * sqrt(n / (n - 1)) * their deviation."""
    values = norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    for n in (5, 20, 500):
        found = bca_interval(0.0, values, np.array([-1.0, 1.0]), n)
        expected = student.ppf(0.975, n - 1) * np.sqrt(n / (n - 1))
        assert found.high == pytest.approx(expected, rel=1e-3)
        assert found.low == pytest.approx(-expected, rel=1e-3)
    assert np.isnan(bca_interval(0.0, values, np.array([-1.0, 1.0]), 1).low)


def test_a_point_outside_all_resamples_has_an_interval_and_no_infinity():
    values = np.linspace(0.2, 0.4, 100)
    found = bca_interval(0.5, values, np.array([0.4, 0.5, 0.6]), PLENTY)
    assert (found.low, found.high) == pytest.approx((0.205, 0.395))


def test_the_jackknife_leaves_out_each_patient_once():
    patients, labels, scores, _ = a_study(patients=30)
    left_out = PatientsLeftOut(patients)
    values = resample(binary_resampled, labels, scores, left_out)["auroc"]
    expected = [roc_auc_score(labels[patients != p], scores[patients != p]) for p in range(30)]
    np.testing.assert_allclose(np.sort(values), np.sort(expected))
    many = PatientsLeftOut(np.arange(1000))
    assert many.multiplicity.shape == (200, 1000)
    np.testing.assert_array_equal((many.multiplicity == 0).sum(axis=0), 1)
    np.testing.assert_array_equal((many.multiplicity == 0).sum(axis=1), 5)


def test_every_stratum_keeps_its_number_of_patients():
    patients, labels, _, _ = a_study()
    resamples = PatientResamples(patients, 50, seed=3, strata=labels)
    positive = np.zeros(60, bool)
    positive[patients[labels == 1]] = True
    drawn = resamples.multiplicity
    np.testing.assert_array_equal(drawn[:, positive].sum(axis=1), positive.sum())
    np.testing.assert_array_equal(drawn[:, ~positive].sum(axis=1), (~positive).sum())
    assert drawn[:, positive].std() > 0


def test_evidence_is_the_patients_of_the_rarer_class():
    patients, labels, scores, _ = a_study()
    labels[patients == 0] = np.nan
    resamples, left_out = PatientResamples(patients, 20), PatientsLeftOut(patients)
    one = estimates(calibration_resampled, labels, 1 / (1 + np.exp(-scores)), resamples, left_out)
    assert one["ece"].evidence == len(set(patients[labels == 1])) < 30
    real = estimates(real_resampled, labels + scores, scores, resamples, left_out)
    assert real["r2"].evidence == 59


def test_a_mean_over_findings_takes_the_point_of_one_that_a_resample_lacks():
    common = Estimate(0.8, np.array([0.7, 0.9]), np.array([0.8]), 50)
    rare = Estimate(0.6, np.array([np.nan, 0.5]), np.array([np.nan]), 3)
    absent = Estimate(np.nan, np.full(2, np.nan), np.full(1, np.nan), 0)
    macro = mean_estimate([common, rare, absent])
    assert macro.point == pytest.approx(0.7)
    np.testing.assert_allclose(macro.resampled, [0.65, 0.7])
    np.testing.assert_allclose(macro.left_out, [0.7])
    assert np.isnan(mean_estimate([absent]).interval().low)


def test_the_freedom_of_a_mean_is_satterthwaites():
    """Two equal variances with 4 and 9 degrees: (1 + 1)^2 / (1 / 4 + 1 / 9)."""
    values = np.array([0.0, 2.0])
    one, two = Estimate(1.0, values, values, 5), Estimate(1.0, values, values, 10)
    assert mean_estimate([one, two]).evidence == pytest.approx(1 + 4 / (1 / 4 + 1 / 9))


def test_seeds_add_their_variance_over_their_number():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 20_000)
    points = np.array([0.70, 0.74, 0.81])
    seeds = [Estimate(p, p + noise, np.full(5, p), 100) for p in points]
    mean = seed_mean(seeds)
    assert mean.point == pytest.approx(0.75)
    expected = 0.01**2 + points.var(ddof=1) / 3
    assert mean.resampled.var() == pytest.approx(expected, rel=0.05)
    assert mean.resampled.mean() == pytest.approx(0.75, abs=0.001)
    assert 3 <= mean.evidence < 4  # nearly all of the variance has two degrees of freedom
    alike = seed_mean([seeds[0]] * 3)
    np.testing.assert_allclose(alike.resampled, seeds[0].resampled)
    assert seed_mean(seeds[:1]) is seeds[0]


def test_ranks_are_scipys_and_name_who_may_be_best():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.05, 1000)  # patients move all encoders alike
    points = [0.80, 0.79, 0.60, 0.80]
    encoders = [Estimate(p, p + shared + rng.normal(0, 0.01, 1000), shared, 50) for p in points]
    ranks = rank_encoders(encoders)
    assert [r.rank for r in ranks] == [1.5, 3, 4, 1.5]
    assert [r.may_be_best for r in ranks] == [True, True, False, True]
    places = rankdata([-one.resampled for one in encoders], axis=0)
    assert ranks[1].low == np.quantile(places[1], 0.025)
    assert ranks[1].high == np.quantile(places[1], 0.975)
    assert ranks[2].best == 0 and sum(r.best for r in ranks) == pytest.approx(1)
    assert (ranks[2].low, ranks[2].high) == (4, 4)
    twins = rank_encoders([encoders[0], encoders[0]])
    assert [(r.rank, r.best, r.may_be_best) for r in twins] == [(1.5, 0.5, True)] * 2


def test_the_best_of_equals_is_kept_in_19_of_20_studies():
    """400 studies, 20 expected: 36 or more have a chance of 1 in 1,000 (binomial)."""
    lost = 0
    for study in range(400):
        rng = np.random.default_rng([9, study])
        points, noise = rng.normal(0, 1, 6), rng.normal(0, 1, (6, 300))
        encoders = [Estimate(p, p + e, e, 100) for p, e in zip(points, noise, strict=True)]
        lost += not rank_encoders(encoders)[0].may_be_best
    assert 6 < lost < 36


def test_age_bands_hold_their_lower_ends():
    ages = np.array([0, 19.9, 20, 40, 79.5, 80, 101, np.nan, -1])
    names = ["0-19", "0-19", "20-39", "40-59", "60-79", "80 and over", "80 and over", None, None]
    assert list(age_bands(ages)) == names


def test_a_subgroup_has_the_metric_of_its_images_and_few_patients_none():
    patients, labels, scores, _ = a_study(patients=300)
    groups = np.array(["F", "M", "F", "M", None, "O"], object)[patients % 6]
    groups[groups == "O"] = np.where(patients[groups == "O"] < 60, "O", "M")
    resamples, left_out = PatientResamples(patients, 200), PatientsLeftOut(patients)
    found = subgroup_results(binary_resampled, "auroc", labels, scores, groups, resamples, left_out)
    by_name = {one.group: one for one in found.groups}
    assert list(by_name) == ["F", "M", "O"]
    women, men = groups == "F", groups == "M"
    f, m, o = by_name["F"], by_name["M"], by_name["O"]
    assert f.value == pytest.approx(roc_auc_score(labels[women], scores[women]))
    assert m.value == pytest.approx(roc_auc_score(labels[men], scores[men]))
    assert (f.n, f.positives) == (women.sum(), (labels[women] == 1).sum())
    assert f.n_patients == len(set(patients[women]))
    assert o.too_few and np.isnan(o.value) and o.estimate is None and o.n > 0
    assert found.gap == pytest.approx(abs(f.value - m.value))
    assert found.gap_interval.low < found.gap < found.gap_interval.high


def test_the_gap_of_equal_groups_holds_0_in_19_of_20_studies():
    """400 studies of five groups, 20 expected outside: 36 or more, a chance of 1 in 1,000."""
    outside, plain = 0, 0
    for study in range(400):
        rng = np.random.default_rng([10, study])
        errors = np.array([1.0, 1, 2, 2, 3])
        points, noise = rng.normal(0, errors), rng.normal(0, errors, (400, 5)).T
        groups = [Estimate(p, p + e, e, 100) for p, e in zip(points, noise, strict=True)]
        outside += gap(groups)[1].low > 0
        top, bottom = groups[int(points.argmax())], groups[int(points.argmin())]
        plain += interval((top - bottom).resampled).low > 0
    assert 4 < outside < 36 < plain  # the two ends of five, taken as any two, are no fair pair


def test_a_planted_feature_scores_1_and_noise_holds_a_half_in_95_of_100_runs():
    """Fewer than 88 of 100 held have a chance of 1.5 in 1,000 (binomial)."""
    held = 0
    for run in range(100):
        rng = np.random.default_rng([12, run])
        sex = np.repeat((np.arange(60) % 2).astype(float), 2)
        resamples = PatientResamples(np.arange(60).repeat(2), count=400, seed=run)
        left_out = PatientsLeftOut(np.arange(60).repeat(2))
        noise = rng.normal(size=60).repeat(2) + 0.1 * rng.normal(size=120)
        bounds = estimates(binary_resampled, sex, noise, resamples, left_out)["auroc"].interval()
        held += bounds.low <= 0.5 <= bounds.high
    planted = estimates(binary_resampled, sex, 2 * sex - 1, resamples, left_out)["auroc"]
    assert planted.point == 1 and planted.interval().low == 1
    assert held >= 88


@pytest.mark.slow
def test_simulated_intervals_and_tests_keep_their_promise():
    """400 studies; three standard errors of 95 % and of 5 %, because some forty shares are seen."""
    error = 3 * np.sqrt(0.05 * 0.95 / 400)
    simulate = runpy.run_path(SIMULATE)
    promised = 0
    for held in simulate["simulations"](400):
        for (case, metric, kind), values in held.items():
            share = np.mean(values)
            if kind in ("DeLong", "permutation"):
                assert share <= 0.05 + error, (case, metric, kind)
                promised += 1
            elif kind in ("BCa", "set") and "ece" not in metric:
                assert share >= 0.95 - error, (case, metric, kind)
                promised += 1
    assert promised > 20
