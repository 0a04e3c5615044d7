"""Tests of two encoders: DeLong against a publication and by brute force, permutations, Holm."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm, rankdata
from scipy.stats import t as student
from sklearn.metrics import r2_score, roc_auc_score

from selfray.evals.metrics import (
    binary_resampled,
    calibration_resampled,
    real_resampled,
)
from selfray.evals.paired_tests import (
    PatientSwaps,
    PermutationTest,
    _interleaved_ranks,
    delong_test,
    holm,
    mean_test,
    permutation_test,
)

PUBLISHED = json.loads((Path(__file__).parent / "delong_published.json").read_text())["cases"]


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case["name"])
def test_delong_is_that_of_mlstatkit_with_one_image_a_patient(case):
    labels, a, b = (np.array(case[name], float) for name in ("labels", "a", "b"))
    ours = delong_test(labels, a, b, np.arange(len(labels)))
    assert ours.difference == pytest.approx(roc_auc_score(labels, a) - roc_auc_score(labels, b))
    assert ours.standard_error == pytest.approx(np.sqrt(case["variance"]), rel=1e-9)
    assert ours.z == pytest.approx(-case["z"], rel=1e-9)  # theirs is b less a
    # Their p is normal, ours Student's with the rarer class's patients less one.
    assert 2 * norm.sf(abs(ours.z)) == pytest.approx(case["p"], rel=1e-9)
    freedom = min((labels == 1).sum(), (labels == 0).sum()) - 1
    assert ours.p == pytest.approx(2 * student.sf(abs(case["z"]), freedom), rel=1e-9)


def brute_force_variance(labels, scores, patients) -> float:
    """Obuchowski's variance of a difference, from all pairs of images, as her article writes it."""
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    m, n = len(positive), len(negative)
    clusters = sorted(set(patients))
    v10, v01, theta = [], [], []
    for s in scores:
        psi = np.array([[(s[i] > s[j]) + (s[i] == s[j]) / 2 for j in negative] for i in positive])
        v10.append(psi.mean(axis=1))
        v01.append(psi.mean(axis=0))
        theta.append(psi.mean())
    i10 = len({patients[i] for i in positive})
    i01 = len({patients[j] for j in negative})
    i = len(clusters)

    def covariance(r: int, t: int) -> float:
        s10 = s01 = s11 = s11_back = 0.0
        for k in clusters:
            pos = [x for x, image in enumerate(positive) if patients[image] == k]
            neg = [x for x, image in enumerate(negative) if patients[image] == k]
            x_r, x_t = (v10[e][pos].sum() - len(pos) * theta[e] for e in (r, t))
            y_r, y_t = (v01[e][neg].sum() - len(neg) * theta[e] for e in (r, t))
            s10 += x_r * x_t
            s01 += y_r * y_t
            s11 += x_r * y_t
            s11_back += x_t * y_r
        s10 *= i10 / ((i10 - 1) * m)
        s01 *= i01 / ((i01 - 1) * n)
        return s10 / m + s01 / n + i / (i - 1) * (s11 + s11_back) / (m * n)

    return covariance(0, 0) + covariance(1, 1) - 2 * covariance(0, 1)


@pytest.mark.parametrize("levels", [3, 1000])
def test_delong_by_patient_is_obuchowskis_by_brute_force(levels):
    rng = np.random.default_rng(levels)
    patients = rng.integers(0, 15, 60)
    labels = rng.integers(0, 2, 60).astype(float)  # many patients have images of both classes
    scores = np.floor(levels * rng.random((2, 60)) + labels)
    nulls = rng.random(60) < 0.15
    ours = delong_test(np.where(nulls, np.nan, labels), *scores, patients)
    expected = brute_force_variance(labels[~nulls], scores[:, ~nulls], patients[~nulls])
    assert ours.standard_error == pytest.approx(np.sqrt(expected), rel=1e-9)
    holders = [len(set(patients[~nulls & (labels == k)])) for k in (0, 1)]
    assert ours.p == pytest.approx(2 * student.sf(abs(ours.z), min(holders) - 1))


def test_copies_of_every_image_change_delongs_error_by_image_and_not_by_patient():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80).astype(float)
    a, b = labels + rng.normal(size=(2, 80))
    once = delong_test(labels, a, b, np.arange(80))
    patients = np.tile(np.arange(80), 3)
    thrice = delong_test(np.tile(labels, 3), np.tile(a, 3), np.tile(b, 3), patients)
    assert thrice.standard_error == pytest.approx(once.standard_error)
    wrong = delong_test(np.tile(labels, 3), np.tile(a, 3), np.tile(b, 3), np.arange(240))
    assert wrong.standard_error < 0.6 * once.standard_error


def test_delong_of_equals_of_one_class_and_of_one_patient():
    labels = np.array([0.0, 1, 0, 1, 1, 0])
    scores = np.arange(6.0)
    same = delong_test(labels, scores, 2 * scores + 1, np.arange(6))
    assert (same.difference, same.z, same.p) == (0, 0, 1)
    assert np.isnan(delong_test(np.ones(6), scores, scores, np.arange(6)).p)
    alone = delong_test(np.array([1.0, 0, 0, 0]), scores[:4], -scores[:4], np.arange(4))
    assert alone.difference == -1 and np.isnan(alone.p)


def swapped_differences(metric, known, a, b, patients, flags) -> list[float]:
    """One permutation at a time, by another library's metric."""
    names = np.unique(patients)
    out = []
    for row in flags:
        swap = row[np.searchsorted(names, patients)] == 1
        first, second = np.where(swap, b, a), np.where(swap, a, b)
        out.append(metric(known, first) - metric(known, second))
    return out


def test_permutations_swap_whole_patients_and_give_scikit_learns_metrics():
    rng = np.random.default_rng(1)
    patients = rng.integers(0, 20, 50).astype(str)
    y, age = rng.integers(0, 2, 50).astype(float), rng.normal(60, 10, 50)
    null = rng.random(50) < 0.2
    keep = ~null
    swaps = PatientSwaps(patients, count=40, seed=2)
    a, b = rng.permutation(50) + 0.0, rng.permutation(50) + 0.0  # ranks already, no two equal
    tests = permutation_test(binary_resampled, np.where(null, np.nan, y), a, b, swaps)
    # Ranks are taken among the labelled images; no two of one encoder are equal here, and of two
    # equal ones of both, b's comes a little before or after.
    a, b = _interleaved_ranks(a[keep], b[keep])
    flags, known = swaps.multiplicity, y[keep]
    labelled = flags[:, np.isin(np.unique(patients), patients[keep])]
    expected = swapped_differences(roc_auc_score, known, a, b, patients[keep], labelled)
    np.testing.assert_allclose(tests["auroc"].swapped, expected, atol=1e-12)
    observed = roc_auc_score(known, a) - roc_auc_score(known, b)
    assert tests["auroc"].difference == pytest.approx(observed)
    a, b = age + rng.normal(0, [[5], [8]], (2, 50))
    real = permutation_test(real_resampled, age, a, b, swaps)["r2"]
    expected = swapped_differences(r2_score, age, a, b, patients, flags)
    np.testing.assert_allclose(real.swapped, expected, atol=1e-9)


def test_interleaved_ranks_keep_both_orders_and_no_tie_between_encoders():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 50)).astype(float)
    first, second = _interleaved_ranks(a, b)
    np.testing.assert_array_equal(rankdata(first), rankdata(a))
    np.testing.assert_array_equal(rankdata(second), rankdata(b))
    assert not set(first) & set(second)


def test_a_p_value_counts_the_observed_difference_and_is_never_zero():
    assert PermutationTest(0.5, np.array([0.1, -0.5, 0.6, 0.2])).p == 3 / 5
    assert PermutationTest(2.0, np.zeros(99)).p == 1 / 100
    assert np.isnan(PermutationTest(np.nan, np.full(9, np.nan)).p)


def test_scores_on_another_scale_change_no_permutation():
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 60).astype(float)
    a, b = y + rng.normal(size=(2, 60))
    swaps = PatientSwaps(np.arange(60), 200)
    plain = permutation_test(binary_resampled, y, a, b, swaps)
    scaled = permutation_test(binary_resampled, y, a, 100 * b - 7, swaps)
    for metric, test in plain.items():
        np.testing.assert_array_equal(test.swapped, scaled[metric].swapped)
    same = permutation_test(binary_resampled, y, a, 3 * a, swaps)
    assert same["auroc"].difference == 0 and same["auroc"].p == 1


def test_permutation_depends_on_the_seed_alone_and_finds_a_real_difference():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 2, 200).astype(float)
    p, noise = 0.1 + 0.8 * y, np.full(200, 0.5)
    patients = np.arange(200).astype(str)
    one, two = (
        permutation_test(calibration_resampled, y, p, noise, PatientSwaps(patients, 99, seed=1))
        for _ in range(2)
    )
    np.testing.assert_array_equal(one["brier"].swapped, two["brier"].swapped)
    assert one["brier"].p == 0.01 and one["brier"].difference < 0
    other = PatientSwaps(patients, 99, seed=2)
    assert (other.multiplicity != PatientSwaps(patients, 99, seed=1).multiplicity).any()


def test_the_macro_test_is_that_of_the_mean_under_the_same_swaps():
    first = PermutationTest(0.3, np.array([0.1, -0.2, 0.5]))
    second = PermutationTest(0.1, np.array([-0.1, -0.2, 0.1]))
    absent = PermutationTest(np.nan, np.full(3, np.nan))
    macro = mean_test([first, absent, second])
    assert macro.difference == pytest.approx(0.2)
    np.testing.assert_allclose(macro.swapped, [0, -0.2, 0.3])
    assert macro.p == 3 / 4 and np.isnan(mean_test([absent]).p)


def test_holm_is_statsmodels_and_leaves_out_what_was_not_tested():
    p = [0.01, 0.04, np.nan, 0.03, 0.005, 0.2, 0.03]
    # statsmodels 0.15.0, multipletests(p, method="holm"), without the null one.
    expected = [0.05, 0.12, np.nan, 0.12, 0.03, 0.2, 0.12]
    np.testing.assert_allclose(holm(p), expected)
    assert len(holm([])) == 0


def test_holm_is_the_closure_of_bonferroni():
    """A hypothesis falls when every set of hypotheses that holds it falls by Bonferroni's test."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(5) ** 3
        closed = np.zeros(5)
        for size in range(1, 6):
            for chosen in itertools.combinations(range(5), size):
                bonferroni = min(1, size * p[list(chosen)].min())
                for k in chosen:
                    closed[k] = max(closed[k], bonferroni)
        np.testing.assert_allclose(holm(p), closed)


def test_equal_encoders_are_told_apart_in_one_study_of_twenty():
    """1,000 studies: three standard errors of 5 % are 2.1 %. By image it would be far more."""
    p_patient, p_image = [], []
    for study in range(1000):
        rng = np.random.default_rng([7, study])
        labels = np.repeat((np.arange(80) % 2).astype(float), 3)
        shared, own = rng.normal(size=(2, 80)).repeat(3, axis=1), rng.normal(size=(2, 240))
        a, b = labels + np.sqrt(0.8) * shared + np.sqrt(0.2) * own
        p_patient.append(delong_test(labels, a, b, np.arange(80).repeat(3)).p)
        p_image.append(delong_test(labels, a, b, np.arange(240)).p)
    assert 0.029 <= np.mean(np.array(p_patient) <= 0.05) <= 0.071
    assert np.mean(np.array(p_image) <= 0.05) > 0.15


def test_permutation_finds_nothing_between_equals_in_19_of_20_studies():
    """200 studies, 10 expected: 21 or more have a chance of 1 in 1,000 (binomial)."""
    found = 0
    for study in range(200):
        rng = np.random.default_rng([8, study])
        labels = np.repeat((np.arange(40) % 2).astype(float), 2)
        a, b = labels + rng.normal(size=(2, 40)).repeat(2, axis=1)
        swaps = PatientSwaps(np.arange(40).repeat(2), 99, seed=study)
        found += permutation_test(binary_resampled, labels, a, b, swaps)["auroc"].p <= 0.05
    assert found <= 20
