"""Probes of one site on another: equal to scikit-learn's, and silent where too few can judge."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from selfray.errors import InputError
from selfray.evals.linear_probe import STRENGTHS
from selfray.evaluate.site_shift import MIN_PATIENTS, transfer_matrix

SPLITS = ("train", "validate", "test")


def simulated(per_split: int = 120, sites: tuple[str, ...] = ("A", "B"), seed: int = 0):
    """One patient an image; feature 0 says the finding, feature 1 too, with the site's sign."""
    rng = np.random.default_rng(seed)
    n = per_split * len(sites) * 3
    site = np.repeat(np.array(sites, object), per_split * 3)
    split = np.tile(np.repeat(SPLITS, per_split), len(sites)).astype(object)
    label = (rng.random(n) < 0.4).astype(np.float64)
    sign = np.where(site == sites[-1], -1.0, 1.0)
    features = rng.standard_normal((n, 5)) * 3.0
    features[:, 0] += 1.5 * label
    features[:, 1] += 6.0 * sign * label
    labels = np.stack([label, np.where(rng.random(n) < 0.3, np.nan, label)], axis=1)
    patients = np.array([f"p{row}" for row in range(n)], object)
    return features, labels, {"sites": site, "splits": split, "patients": patients}


def sklearn_predictions(features, labels, fit, choose, test) -> np.ndarray:
    """The penalty with the best AUROC on `choose`; of equals the highest."""
    mean, scale = features[fit].mean(0), features[fit].std(0)
    x = (features - mean) / scale
    fit, choose = (rows[~np.isnan(labels[rows])] for rows in (fit, choose))
    best = (-1.0, np.empty(0))
    for strength in sorted(STRENGTHS, reverse=True):
        model = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000)
        model.fit(x[fit], labels[fit])
        score = roc_auc_score(labels[choose], model.predict_proba(x[choose])[:, 1])
        if score > best[0] + 1e-12:
            best = (score, model.predict_proba(x[test])[:, 1])
    return best[1]


def test_each_cell_is_scikit_learns_probe_of_one_site_on_the_other():
    features, labels, where = simulated()
    transfers = transfer_matrix(features, labels, ["effusion", "nodule"], **where)
    assert [(t.train_site, t.test_site, t.finding) for t in transfers] == [
        (a, b, f) for a in "AB" for b in "AB" for f in ("effusion", "nodule")
    ]
    for t in transfers:
        k = ("effusion", "nodule").index(t.finding)
        of = {s: np.flatnonzero((where["sites"] == t.train_site) & (where["splits"] == s))
              for s in SPLITS}  # fmt: skip
        test = np.flatnonzero((where["sites"] == t.test_site) & (where["splits"] == "test"))
        np.testing.assert_array_equal(t.rows, test[~np.isnan(labels[test, k])])
        expected = sklearn_predictions(features, labels[:, k], of["train"], of["validate"], t.rows)
        np.testing.assert_allclose(t.predictions, expected, atol=2e-3)


def test_a_sign_that_belongs_to_a_site_does_not_carry():
    features, labels, where = simulated()
    auroc = {
        (t.train_site, t.test_site): roc_auc_score(labels[t.rows, 0], t.predictions)
        for t in transfer_matrix(features, labels[:, :1], ["effusion"], **where)
    }
    assert min(auroc["A", "A"], auroc["B", "B"]) > 0.9
    assert max(auroc["A", "B"], auroc["B", "A"]) < 0.5


def test_a_site_with_one_patient_is_too_few_and_the_others_are_judged():
    features, labels, where = simulated()
    where["sites"] = where["sites"].copy()
    where["patients"] = where["patients"].copy()
    moved = np.flatnonzero((where["sites"] == "A") & (where["splits"] == "test"))[:50]
    where["sites"][moved] = "C"  # many images, one patient
    where["patients"][moved] = "p"
    where["sites"][np.flatnonzero(where["splits"] == "train")[:3]] = None
    transfers = transfer_matrix(features, labels[:, :1], ["effusion"], **where)
    by_cell = {(t.train_site, t.test_site): t for t in transfers}
    assert len(by_cell) == 9
    for site in "AB":
        onto = by_cell[site, "C"]
        assert onto.predictions is None and len(onto.rows) == 50
        assert "too few test patients: 1 with the finding and 1 without, at least 20" in onto.reason
        assert by_cell["C", site].reason == "the site it is trained on has no train images"
        assert by_cell[site, site].reason is None


def test_twenty_patients_of_each_class_are_enough_and_nineteen_are_not():
    features, labels, where = simulated()
    test = np.flatnonzero((where["sites"] == "B") & (where["splits"] == "test"))
    labels[test, 0] = np.nan
    labels[test[: 2 * MIN_PATIENTS], 0] = np.arange(2 * MIN_PATIENTS) % 2
    for enough in (True, False):
        cells = transfer_matrix(features, labels[:, :1], ["effusion"], **where)
        assert [t.reason is None for t in cells if t.test_site == "B"] == [enough] * 2
        labels[test[0], 0] = np.nan


def test_a_site_that_lacks_a_class_to_fit_says_so():
    features, labels, where = simulated()
    train = (where["sites"] == "B") & (where["splits"] == "train")
    labels[train, 0] = 0
    cells = transfer_matrix(features, labels[:, :1], ["effusion"], **where)
    reasons = {(t.train_site, t.test_site): t.reason for t in cells}
    assert reasons["A", "B"] is None
    expected = "of the site it is trained on, the train split lacks both classes"
    assert reasons["B", "A"] == reasons["B", "B"] == expected


@pytest.mark.parametrize("only", ["A", None])
def test_fewer_than_two_sites_are_refused(only):
    features, labels, where = simulated(per_split=4)
    where["sites"] = np.full(len(features), only, object)
    count = "1 site;" if only else "0 sites;"
    with pytest.raises(InputError, match=f"the data has {count}"):
        transfer_matrix(features, labels, ["effusion", "nodule"], **where)
